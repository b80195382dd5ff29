"""Raised programs of tiny random models of every family, and what a function-preserving pass is held to."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch

import mxfx.ops  # noqa: F401  (registers the dialect)
from mxfx.graph.execute import execute
from mxfx.graph.program import Program
from mxfx.graph.tiny import tiny
from mxfx.graph.trace import trace
from mxfx.passes import RaiseAttention, RaiseNorm, RaiseRope
from mxfx.rewrite import Context, Pass, PassRecord, apply

_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


@cache
def _raised(family: str) -> Program:
    """Two layers, grouped heads, float64; gains, biases and the mean of the embeddings are not neutral."""
    biased = {"attention_bias": True} if family == "llama-tiny" else {}
    program = trace(tiny(family, dtype=torch.float64, **_SIZES, **biased)).twin(torch.float64)
    for raising in (RaiseNorm(), RaiseRope(), RaiseAttention()):
        program = apply(raising, program).program
    return program


@pytest.fixture
def raised() -> Callable[[str], Program]:
    return _raised


@pytest.fixture
def ctx() -> Context:
    """A context with calibration tokens for the tiny vocabulary."""
    return Context(seed=1, tokens=lambda: torch.randint(3, 128, (6, 24), generator=torch.Generator().manual_seed(5)))


@pytest.fixture
def logits() -> Callable[[Program], torch.Tensor]:
    """Logits on a padded batch, rows of real tokens only, in the program's dtype."""

    def run(program: Program) -> torch.Tensor:
        ids = torch.randint(3, 128, (2, 13), generator=torch.Generator().manual_seed(7))
        mask = torch.ones_like(ids)
        mask[0, :4] = 0
        return execute(program, ids, None, mask)[mask.bool()]

    return run


@pytest.fixture
def preserved(
    ctx: Context, logits: Callable[[Program], torch.Tensor]
) -> Callable[[Pass, Program], tuple[Program, PassRecord]]:
    """Apply a pass to a float64 program and assert that its logits stay within 1e-9, ‖Δ‖/‖y‖."""

    def check(pass_: Pass, program: Program) -> tuple[Program, PassRecord]:
        before = logits(program)
        applied = apply(pass_, program, ctx)
        after = logits(applied.program)
        error = float((after - before).norm() / before.norm())
        assert error <= 1e-9, f"{pass_.name} changed the logits by {error:.1e}"
        return applied.program, applied.record

    return check
