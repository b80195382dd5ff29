"""What the compiler itself costs on Llama shapes of 16, 32 and 80 layers, without weights.

    python -m tools.bench.compiler [--json FILE] [--quick]

Every parameter lives on the meta device. A row is one stage: seconds, those of the processor in user mode, and nodes
after it for each depth, and how the latter seconds grow from the shallowest to the deepest (1 is linear in layers, 2
quadratic).
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import mxfx.ops.kernels  # noqa: F401  (registers the fused ops)
from mxfx.formats import parse
from mxfx.graph.program import Program
from mxfx.graph.trace import trace
from mxfx.graph.verify import verify
from mxfx.passes.annotate import Annotate, Rule
from mxfx.passes.fuse_activation_quant import FuseActivationQuant
from mxfx.passes.fuse_hadamard_quant import FuseHadamardQuant
from mxfx.passes.fuse_norm import FuseNorm
from mxfx.passes.fuse_norm_quant import FuseNormQuant
from mxfx.passes.fuse_rope_quant import FuseRopeQuant
from mxfx.passes.insert_fake_quant import InsertFakeQuant
from mxfx.passes.lower import Lower
from mxfx.passes.quantize_kv_cache import QuantizeKvCache
from mxfx.passes.raise_attention import RaiseAttention
from mxfx.passes.raise_norm import RaiseNorm
from mxfx.passes.raise_rope import RaiseRope
from mxfx.passes.rotate_qk import RotateQk
from mxfx.rewrite import Context, Pass, Selector, apply
from tools.bench.measuring import finish, options

FORMAT = parse("mxint4@32/mse")
#: Seconds of the processor; its clock ticks every hundredth.
MEASURABLE = 0.05


def llama(layers: int) -> LlamaForCausalLM:
    """Llama 70B's shape, `layers` deep, on the meta device."""
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=layers,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def passes() -> list[Pass]:
    """Everything that needs no calibration."""
    rules = (
        Rule(Selector(r"model\.layers\.\d+\..*proj"), weight=FORMAT, input=FORMAT),
        Rule(Selector(r"model\.layers\.\d+\.self_attn"), kv=FORMAT),
    )
    return [
        RaiseNorm(),
        RaiseRope(),
        RaiseAttention(),
        FuseNorm(),
        RotateQk(block=32),
        Annotate(rule=rules),
        InsertFakeQuant(),
        QuantizeKvCache(),
        FuseHadamardQuant(),
        FuseNormQuant(),
        FuseActivationQuant(),
        FuseRopeQuant(),
        Lower(),
    ]


@dataclass(frozen=True)
class Stage:
    """What one stage took, and the nodes after it."""

    seconds: float
    user: float
    nodes: int


def stages(layers: int) -> dict[str, Stage]:
    """Every stage, in order."""
    found: dict[str, Stage] = {}
    last = os.times()

    def took(name: str, program: Program | None) -> None:
        nonlocal last
        now = os.times()
        found[name] = Stage(now.elapsed - last.elapsed, now.user - last.user, _nodes(program) if program else 0)
        last = now

    model = llama(layers)
    took("build meta model", None)
    program = trace(model)
    took("trace", program)
    for one in passes():
        program = apply(one, program, Context()).program
        took(one.name, program)
        if one.name == "insert-fake-quant":
            verify(program)
            took("verify", program)
    all_ = found.values()
    found["all"] = Stage(sum(s.seconds for s in all_), sum(s.user for s in all_), _nodes(program))
    return found


def _nodes(program: Program) -> int:
    return len(program.graph.nodes)


def main() -> None:
    arguments = options("Seconds of trace, passes and verifier")
    depths = (4, 16) if arguments.quick else (16, 32, 80)
    stages(2)  # imports and caches belong to no row
    measured = {layers: stages(layers) for layers in depths}
    first, last = depths[0], depths[-1]
    rows: list[dict[str, object]] = []
    for name in measured[first]:
        row: dict[str, object] = {"stage": name}
        for layers in depths:
            stage = measured[layers][name]
            row |= {f"{layers} layers, s": stage.seconds, f"{layers}, user s": stage.user}
            row[f"{layers}, nodes"] = stage.nodes
        shallow, deep = measured[first][name].user, measured[last][name].user
        row["growth"] = round(math.log(deep / shallow) / math.log(last / first), 2) if shallow >= MEASURABLE else ""
        rows.append(row)
    finish(rows, arguments.json)


if __name__ == "__main__":
    main()
