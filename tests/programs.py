"""Traced programs of tiny models, each traced once a process; passes copy, so that nobody changes them."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor, nn

from mxfx.formats import Format, parse
from mxfx.graph.program import Program
from mxfx.graph.tiny import tiny
from mxfx.graph.trace import trace
from mxfx.passes import (
    Annotate,
    InsertFakeQuant,
    QuantizeKvCache,
    RaiseAttention,
    RaiseNorm,
    RaiseRope,
    RoundWeights,
    Rule,
)
from mxfx.rewrite import Pass, Selector, apply

QKVO = r"model\.layers\.\d+\.self_attn\.(q|k|v|o)_proj"
MLP = r"model\.layers\.\d+\.mlp\.(gate|up|down)_proj"
ATTENTION = r"model\.layers\.\d+\.self_attn"
RAISE: tuple[Pass, ...] = (RaiseNorm(), RaiseRope(), RaiseAttention())
MXINT4 = parse("mxint4@32/ceil")


@cache
def model(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A tiny model that tests read only."""
    return tiny(family, dtype=dtype)


@cache
def traced(family: str) -> Program:
    """The normalized float32 program, before any pass."""
    return trace(model(family))


@cache
def raised(family: str) -> Program:
    """The float32 program with norms, rotary embeddings and attention as single nodes."""
    return passed(traced(family), RAISE)


def passed(program: Program, passes: Iterable[Pass]) -> Program:
    for pass_ in passes:
        program = apply(pass_, program).program
    return program


def config_a(weight: Format = MXINT4, activation: Format = MXINT4, kv: Format | None = MXINT4) -> tuple[Pass, ...]:
    """The passes of the tutorial's configuration A; ``kv=None`` leaves the cache in the model's dtype."""
    rules = [Rule(Selector(pattern), weight=weight, input=activation) for pattern in (QKVO, MLP)]
    attention = [] if kv is None else [Rule(Selector(ATTENTION), kv=kv)]
    cached = [] if kv is None else [QuantizeKvCache()]
    return Annotate(rule=(*rules, *attention)), RoundWeights(), InsertFakeQuant(), *cached


def padded_batch(vocabulary: int = 128) -> tuple[Tensor, Tensor, Tensor]:
    """``input_ids``, left-padded ``attention_mask`` and its ``position_ids``, int64 ``(3, 13)``; padding 0, 4 and 9."""
    ids = torch.randint(3, vocabulary, (3, 13), generator=torch.Generator().manual_seed(7))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    mask[2, :9] = 0
    return ids, mask, (mask.cumsum(-1) - 1).clamp_min(0)


def relative(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖ in float64."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())
