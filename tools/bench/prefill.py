"""What simulated quantization costs a prefill: Llama-3.2-1B's shape, random weights, bfloat16, 8 × 2048 tokens.

    python tools/bench/prefill.py [--json FILE] [--quick] [--rehearse]

Rows: the Hugging Face model in eager mode; the emitted float graph; W4A4KV4 as the tutorial's config A (no
transforms) and with transforms everywhere (config D's graph: a matrix per block of every linear's input, rotated
queries and keys). Each eager, as a CUDA graph and through `torch.compile`, in milliseconds and as multiples of the
eager Hugging Face model. Weights are random, so only time means anything here.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import mxfx.ops.kernels  # noqa: F401  (registers kernels and fused ops)
from mxfx.formats import parse
from mxfx.graph.module import build
from mxfx.graph.node import op_name
from mxfx.graph.program import Program
from mxfx.graph.trace import trace
from mxfx.passes.annotate import Annotate, Rule
from mxfx.passes.fuse_activation_quant import FuseActivationQuant
from mxfx.passes.fuse_hadamard_quant import FuseHadamardQuant
from mxfx.passes.fuse_norm_quant import FuseNormQuant
from mxfx.passes.fuse_rope_quant import FuseRopeQuant
from mxfx.passes.insert_fake_quant import InsertFakeQuant
from mxfx.passes.lower import Lower
from mxfx.passes.quantize_kv_cache import QuantizeKvCache
from mxfx.passes.raise_attention import RaiseAttention
from mxfx.passes.raise_norm import RaiseNorm
from mxfx.passes.raise_rope import RaiseRope
from mxfx.passes.rotate_qk import RotateQk
from mxfx.passes.transform_inputs import TransformInputs
from mxfx.rewrite import Context, Pass, Selector, apply
from tools.bench.measuring import finish, median_ms, options, require_cuda


def llama(layers: int, device: str) -> LlamaForCausalLM:
    """Llama-3.2-1B's shape; on a CPU, for a rehearsal, an eighth as wide and with few tokens to embed."""
    share = 1 if device == "cuda" else 8
    config = LlamaConfig(
        vocab_size=128256 // share**2,
        hidden_size=2048 // share,
        intermediate_size=8192 // share,
        num_hidden_layers=layers,
        num_attention_heads=32 // share,
        num_key_value_heads=8 // share,
        head_dim=64,
        max_position_embeddings=131072,
        rope_theta=500000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    with torch.device(device):
        return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def quantizers(rule: str, *, transforms: bool) -> list[Pass]:
    """A4 on every decoder linear, KV4, and the fusions; online transforms if asked."""
    form = parse(f"mxint4@32{rule}")
    rules = (
        Rule(Selector(r"model\.layers\.\d+\..*proj"), input=form),
        Rule(Selector(r"model\.layers\.\d+\.self_attn"), kv=form),
    )
    online: list[Pass] = [TransformInputs(signs=True), RotateQk(block=32)] if transforms else []
    fusions: list[Pass] = [FuseHadamardQuant(), FuseNormQuant(), FuseActivationQuant(), FuseRopeQuant()]
    return [*online, Annotate(rule=rules), InsertFakeQuant(), QuantizeKvCache(), *fusions]


def emitted(program: Program, passes: list[Pass], device: str) -> torch.fx.GraphModule:
    """The program after `passes`, lowered for the device."""
    ctx = Context(device=torch.device(device))
    for one in (*passes, Lower()):
        program = apply(one, program, ctx).program
    return build(program).to(device)


def kernels_in(module: torch.fx.GraphModule) -> int:
    return sum(op_name(node).startswith("mxfx_kernels") for node in module.graph.nodes)


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """`call` as one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def measure(name: str, call: Callable[[], object], base: float | None, **more: object) -> dict[str, object]:
    """One row; a variant that fails says why and does not end the run."""
    try:
        call()
        ms = median_ms(call, rep=500) if torch.cuda.is_available() else _once_ms(call)
        return {"variant": name, "ms": ms, "× eager HF": ms / base if base else 1.0, "note": _said(more)}
    except Exception as error:
        return _failed(name, error)


def _once_ms(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def _failed(name: str, error: Exception) -> dict[str, object]:
    said = " ".join(str(error).split())[:200]
    return {"variant": name, "ms": 0.0, "× eager HF": 0.0, "note": f"{type(error).__name__}: {said}"}


def _said(more: dict[str, object]) -> str:
    return ", ".join(f"{value} {key}" for key, value in more.items())


def variants(
    name: str, module: torch.nn.Module, ids: torch.Tensor, base: float, compiled: bool
) -> list[dict[str, object]]:
    """Eager, as a CUDA graph, and compiled if asked."""

    def call() -> object:
        return module(ids)

    count = kernels_in(module) if isinstance(module, torch.fx.GraphModule) else 0
    rows = [measure(f"{name}, eager", call, base, kernels=count)]
    if torch.cuda.is_available():
        try:
            rows.append(measure(f"{name}, CUDA graph", captured(call), base))
        except Exception as error:
            rows.append(_failed(f"{name}, CUDA graph", error))
    if compiled:
        torch._dynamo.reset()
        function = torch.compile(module, fullgraph=True, dynamic=False)
        start = time.perf_counter()
        row = measure(f"{name}, compiled", lambda: function(ids), base)
        rows.append(row | {"note": f"{row['note']} cold {time.perf_counter() - start:.0f} s with timing"})
    torch.cuda.empty_cache()
    return rows


@torch.no_grad()
def main() -> None:
    arguments = options("Prefill of the quantized graph beside the float model", rehearsal=True)
    if not arguments.rehearse:
        require_cuda()
    device = "cpu" if arguments.rehearse else "cuda"
    torch.manual_seed(0)
    model = llama(2 if arguments.rehearse else 4 if arguments.quick else 16, device)
    shape = (2, 64) if arguments.rehearse else (8, 2048)
    ids = torch.randint(0, model.config.vocab_size, shape, device=device)
    rows = [measure("Hugging Face, eager", lambda: model(ids, use_cache=False), None)]
    base = float(rows[0]["ms"])  # type: ignore[arg-type]
    program = trace(model)
    for one in (RaiseNorm(), RaiseRope(), RaiseAttention()):
        program = apply(one, program).program
    jobs: dict[str, list[Pass]] = {
        "float": [],
        "config A": quantizers("/ceil", transforms=False),
        "A with mse": quantizers("/mse", transforms=False),
        "config D": quantizers("/mse", transforms=True),
    }
    for name, passes in jobs.items():
        try:
            module = emitted(program, passes, device)
        except Exception as error:
            rows.append(_failed(name, error))
            continue
        rows += variants(name, module, ids, base, compiled=not arguments.quick and name != "A with mse")
        del module
    finish(rows, arguments.json)


if __name__ == "__main__":
    main()
