"""What the compiler itself costs on Llama shapes of 16, 32 and 80 layers, without weights.

    python tools/bench/compiler.py [--json FILE] [--quick]

Every parameter lives on the meta device. A row is one stage: seconds and nodes after it for each depth, and how
the seconds grow from the shallowest to the deepest (1 is linear in layers, 2 quadratic).
"""

from __future__ import annotations

import math
import time

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


def stages(layers: int) -> dict[str, tuple[float, int]]:
    """Seconds and node count of every stage, in order."""
    found: dict[str, tuple[float, int]] = {}
    start = time.perf_counter()
    model = llama(layers)
    found["build meta model"] = (time.perf_counter() - start, 0)
    start = time.perf_counter()
    program = trace(model)
    found["trace"] = (time.perf_counter() - start, _nodes(program))
    for one in passes():
        start = time.perf_counter()
        program = apply(one, program, Context()).program
        found[one.name] = (time.perf_counter() - start, _nodes(program))
        if one.name == "insert-fake-quant":
            start = time.perf_counter()
            verify(program)
            found["verify"] = (time.perf_counter() - start, _nodes(program))
    found["all"] = (sum(seconds for seconds, _ in found.values()), _nodes(program))
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
            row[f"{layers} layers, s"], row[f"{layers}, nodes"] = measured[layers][name]
        growth = measured[last][name][0] / max(measured[first][name][0], 1e-9)
        row["growth"] = round(math.log(max(growth, 1e-9)) / math.log(last / first), 2)
        rows.append(row)
    finish(rows, arguments.json)


if __name__ == "__main__":
    main()
