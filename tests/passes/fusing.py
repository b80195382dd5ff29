"""A quantized tiny model in float32, and what every fusion pass is held to."""

from __future__ import annotations

import torch

import mxfx.ops.kernels  # noqa: F401  (registers the fused ops)
from mxfx.formats import parse
from mxfx.graph.module import build
from mxfx.graph.node import kind
from mxfx.graph.program import Program
from mxfx.passes import Annotate, InsertFakeQuant, Lower, QuantizeKvCache, RotateQk, Rule, TransformInputs
from mxfx.rewrite import Context, Pass, PassRecord, Selector, apply

FORMAT = "mxint4@16"
EVERY_LINEAR = r"model\.layers\.\d+\..*proj"


def quantized(program: Program, ctx: Context, *, transforms: bool) -> Program:
    """Inputs of all decoder linears, keys and values in 4 bits, in float32; with block transforms if asked."""
    passes: list[Pass] = [
        Annotate(
            rule=(Rule(Selector(EVERY_LINEAR), input=parse(FORMAT)), Rule(Selector(r".*self_attn"), kv=parse(FORMAT)))
        ),
        InsertFakeQuant(),
        QuantizeKvCache(),
    ]
    if transforms:
        passes = [TransformInputs(kind="hadamard", block=16), RotateQk(block=16), *passes]
    program = program.twin(torch.float32)
    for one in passes:
        program = apply(one, program, ctx).program
    return program


def fused(pass_: Pass, program: Program, ctx: Context) -> tuple[Program, PassRecord]:
    """Apply a fusion; what it emits on a CPU, where no kernel serves, must give the same logits to the bit."""
    applied = apply(pass_, program, ctx)
    torch.testing.assert_close(_logits(applied.program, ctx), _logits(program, ctx), rtol=0, atol=0)
    return applied.program, applied.record


def count(program: Program, name: str) -> int:
    return sum(1 for node in program.graph.nodes if kind(node) == name)


def _logits(program: Program, ctx: Context) -> torch.Tensor:
    ids = torch.randint(3, 128, (2, 13), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        return build(apply(Lower(), program, ctx).program)(ids)
