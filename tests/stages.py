"""Programs of every family at three stages, traced once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest

from mxfx.formats import parse
from mxfx.graph.program import Program
from mxfx.graph.tiny import tiny
from mxfx.graph.trace import trace
from mxfx.passes import (
    Annotate,
    InsertFakeQuant,
    Lower,
    QuantizeKvCache,
    RaiseAttention,
    RaiseNorm,
    RaiseRope,
    RoundWeights,
    Rule,
)
from mxfx.rewrite import Selector, apply

_RAISE = (RaiseNorm(), RaiseRope(), RaiseAttention())
_QUANTIZE = (
    Annotate(
        rule=(
            Rule(match=Selector(r".*_proj"), weight=parse("mxint4@32"), input=parse("mxint4@32")),
            Rule(match=Selector(r".*self_attn"), kv=parse("mxfp8_e4m3@16")),
        )
    ),
    InsertFakeQuant(),
    QuantizeKvCache(),
    RoundWeights(),
)
_STAGES = {
    "traced": (),
    "raised": _RAISE,
    "quantized": (*_RAISE, *_QUANTIZE),
    "lowered": (*_RAISE, *_QUANTIZE, Lower()),
}


@cache
def _program(family: str, stage: str) -> Program:
    program = trace(tiny(family), name=family) if stage == "traced" else _program(family, "traced")
    for pass_ in _STAGES[stage]:
        program = apply(pass_, program).program
    return program


@pytest.fixture(scope="session")
def program() -> Callable[[str, str], Program]:
    """``program("llama-tiny", "quantized")``; copy it before you damage it."""
    return _program
