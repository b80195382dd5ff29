"""What simulated quantization costs a prefill: Llama-3.2-1B's shape, random weights, bfloat16, 8 × 2048 tokens.

    python -m tools.bench.prefill [--json FILE] [--quick] [--compiled] [--packed] [--profile] [--layers N]
        [--rehearse]

Rows: the Hugging Face model in eager mode; W4A4KV4 as the tutorial's config A (no transforms) and as config D's graph
(`passes_configs/best_w4a4kv4.toml`: a matrix for every block of every linear's input, one a head for queries and keys);
the emitted float graph; A with the `mse` rule. Each eager and as a CUDA graph; with `--compiled` only A and D, through
`torch.compile`. With `--packed` instead D with its weights rounded and packed and its products in FP8, D with them
rounded and in bfloat16, the emitted float graph, and the Hugging Face model through `torch.compile`; with the bytes of
the decoder's weights. In milliseconds and as multiples of the eager Hugging Face model. Weights and transforms are
random, so only time and memory mean anything here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import fx
from transformers import LlamaConfig, LlamaForCausalLM

import mxfx.ops.kernels  # noqa: F401  (registers kernels and fused ops)
from mxfx.config.emit import EmitConfig
from mxfx.formats import parse
from mxfx.graph.module import build
from mxfx.graph.node import layer_of, op_name, path_of
from mxfx.graph.program import Program
from mxfx.graph.regions import siblings
from mxfx.graph.trace import trace
from mxfx.ops.kernels.packed import inexact_count
from mxfx.passes.annotate import Annotate, Rule
from mxfx.passes.fuse_norm import FuseNorm
from mxfx.passes.insert_fake_quant import InsertFakeQuant
from mxfx.passes.quantize_kv_cache import QuantizeKvCache
from mxfx.passes.raise_attention import RaiseAttention
from mxfx.passes.raise_norm import RaiseNorm
from mxfx.passes.raise_rope import RaiseRope
from mxfx.passes.round_weights import RoundWeights
from mxfx.pipeline.emit import emitted as emit_stage
from mxfx.rewrite import Context, Lossy, Numerics, Pass, Rewriter, Selector, apply
from tools.bench.measuring import arguments_of, finish, median_ms, require_cuda, table


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


@dataclass(frozen=True)
class RandomTransforms(Pass):
    """The online transforms of config D, with random matrices: at the inputs of linears, and on queries and keys."""

    name: ClassVar[str] = "random-transforms"
    numerics: ClassVar[Numerics] = Lossy()
    block: int = 32

    def run(self, rw: Rewriter, ctx: Context) -> None:
        generator = torch.Generator().manual_seed(0)

        def transformed(source: fx.Node, shape: tuple[int, ...], like: fx.Node, name: str) -> fx.Node:
            matrix = torch.randn(*shape, self.block, self.block, generator=generator) / self.block**0.5
            # As transform-inputs and transform-kv store them.
            weight = rw.add_weight(f"transforms.{path_of(like)}.{name}", matrix, like, constant=name == "query")
            return rw.call(torch.ops.mxfx.block_transform.default, source, weight, like=like)

        for source, linears in siblings(rw.program).items():
            if layer_of(linears[0]) is not None and rw.match(linears[0]):
                width = source.meta["val"].shape[-1]
                new = transformed(source, (width // self.block,), linears[0], "input")
                for linear in linears:
                    rw.set_operand(linear, 0, new)
        for attention in rw.program.nodes("attention"):
            if not rw.match(attention):
                continue
            heads, width = (attention.args[1].meta["val"].shape[axis] for axis in (1, -1))
            for position, name in enumerate(("query", "key")):
                new = transformed(attention.args[position], (heads, width // self.block), attention, name)
                rw.set_operand(attention, position, new)


def quantizers(rule: str, *, transforms: bool, weights: bool = False) -> list[Pass]:
    """A4 on every decoder linear and KV4; online transforms and W4 if asked."""
    form = parse(f"mxint4@32{rule}")
    rules = (
        Rule(Selector(r"model\.layers\.\d+\..*proj"), input=form, weight=form if weights else None),
        Rule(Selector(r"model\.layers\.\d+\.self_attn"), kv=form),
    )
    online: list[Pass] = [FuseNorm(), RandomTransforms()] if transforms else []
    rounding: list[Pass] = [RoundWeights()] if weights else []
    return [*online, Annotate(rule=rules), *rounding, InsertFakeQuant(), QuantizeKvCache()]


def emitted(
    program: Program, passes: list[Pass], device: str, packed: bool = False, sums: Literal["exact", "fast"] = "exact"
) -> fx.GraphModule:
    """The program after `passes`, emitted for the device, which on a GPU fuses its quantizers."""
    for one in passes:
        program = apply(one, program).program
    return build(emit_stage(program, device, EmitConfig(packed=packed, sums=sums))).to(device)


def decoder_bytes(module: fx.GraphModule | LlamaForCausalLM) -> int:
    """What the weights of all decoder layers take."""
    stored = {id(t): t for n, t in (*module.named_parameters(), *module.named_buffers()) if "layers." in n}
    return sum(tensor.nbytes for tensor in stored.values())


def kernels_in(module: fx.GraphModule) -> int:
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


def variants(name: str, module: fx.GraphModule, ids: torch.Tensor, base: float) -> Iterator[dict[str, object]]:
    """Eager, and as a CUDA graph."""

    def call() -> object:
        return module(ids)

    yield measure(f"{name}, eager", call, base, kernels=kernels_in(module))
    if torch.cuda.is_available():
        try:
            yield measure(f"{name}, CUDA graph", captured(call), base)
        except Exception as error:
            yield _failed(f"{name}, CUDA graph", error)
        torch.cuda.empty_cache()


def compiled(name: str, module: fx.GraphModule, ids: torch.Tensor, base: float) -> Iterator[dict[str, object]]:
    """Through `torch.compile` as one graph, for these shapes alone and for all; what the first call took."""
    for shapes, dynamic in (("these shapes", False), ("all shapes", True)):
        torch._dynamo.reset()
        function = torch.compile(module, fullgraph=True, dynamic=dynamic)
        start = time.perf_counter()
        try:
            function(ids)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            cold = f"first call {time.perf_counter() - start:.1f} s"
        except Exception as error:
            yield _failed(f"{name}, compiled for {shapes}", error)
            continue
        row = measure(f"{name}, compiled for {shapes}", lambda function=function: function(ids), base)
        yield row | {"note": cold}


def profiled(module: fx.GraphModule, ids: torch.Tensor, heaviest: int = 30) -> str:
    """Milliseconds and launches of the kernels that take longest in one call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        module(ids)
        torch.cuda.synchronize()
    found = sorted(profile.key_averages(), key=lambda e: -e.self_device_time_total)
    rows = [
        {"ms": e.self_device_time_total / 1e3, "launches": e.count, "kernel": e.key[:110]} for e in found[:heaviest]
    ]
    total = sum(e.self_device_time_total for e in found) / 1e3
    return f"{table(rows)}\nall kernels: {total:.2f} ms"


@torch.no_grad()
def main() -> None:
    parser = arguments_of("Prefill of the quantized graph beside the float model")
    parser.add_argument("--compiled", action="store_true", help="A and D through torch.compile instead")
    parser.add_argument("--packed", action="store_true", help="D with packed weights and FP8 products instead")
    parser.add_argument("--profile", action="store_true", help="what each kernel takes, too; nothing is compiled")
    parser.add_argument("--layers", type=int, default=16, help="decoder layers")
    parser.add_argument("--rehearse", action="store_true", help="everything once, tiny, on the CPU; times say nothing")
    arguments = parser.parse_args()
    if not arguments.rehearse:
        require_cuda()
    device = "cpu" if arguments.rehearse else "cuda"
    torch.manual_seed(0)
    model = llama(min(arguments.layers, 2) if arguments.rehearse else arguments.layers, device)
    shape = (2, 64) if arguments.rehearse else (8, 2048)
    ids = torch.randint(0, model.config.vocab_size, shape, device=device)
    rows = [measure("Hugging Face, eager", lambda: model(ids, use_cache=False), None)]
    base = float(rows[0]["ms"])  # type: ignore[arg-type]
    print(table(rows), flush=True)
    program = trace(model)
    for one in (RaiseNorm(), RaiseRope(), RaiseAttention()):
        program = apply(one, program).program
    jobs: dict[str, list[Pass]] = {
        "config A": quantizers("/ceil", transforms=False),
        "config D": quantizers("/mse", transforms=True),
    }
    if arguments.packed:
        in_bf16 = quantizers("/mse", transforms=True, weights=True)
        jobs = {"config D, packed": in_bf16, "config D, packed, fast sums": in_bf16}
        jobs |= {"config D, bf16 weights": in_bf16, "float": []}
        jobs = dict(list(jobs.items())[:1]) if arguments.profile else jobs
    elif not arguments.quick and not arguments.compiled:
        jobs |= {"float": [], "A with mse": quantizers("/mse", transforms=False)}
    bytes_of_bf16 = decoder_bytes(model)
    for name, passes in jobs.items():
        try:
            sums: Literal["exact", "fast"] = "fast" if "fast" in name else "exact"
            module = emitted(program, passes, device, packed="packed" in name, sums=sums)
        except Exception as error:
            rows.append(_failed(name, error))
            continue
        print(f"{name}: decoder weights {decoder_bytes(module) / bytes_of_bf16:.3f} of bfloat16's", flush=True)
        for row in (compiled if arguments.compiled else variants)(name, module, ids, base):
            # At once, so that a run that is cut short has said what it found.
            print(table([row]), flush=True)
            rows.append(row)
        if arguments.profile:
            print(profiled(module, ids), flush=True)
        del module
    if arguments.packed and not arguments.profile:
        function = torch.compile(model)
        rows.append(measure("Hugging Face, compiled", lambda: function(ids, use_cache=False), base))
        print(f"inexact rows: {inexact_count()}")
    finish(rows, arguments.json)


if __name__ == "__main__":
    main()
