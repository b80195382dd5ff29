"""Time and memory of GPTQ of one layer of experts, with random weights and tokens.

    python -m tools.bench.experts --shape qwen3-30b-a3b --samples 128 --length 2048 --device cuda [--json FILE]
    python -m tools.bench.experts --shape tiny --samples 8 --length 64

Prints machine and versions, then a row for the whole layer and one for its attention alone: seconds of the pass (median
of ``--repeat``, and the first run, which compiles kernels), the peak of allocated device memory, the tokens of the
expert that got least, how many weights had a Hessian of their own, and the loss over that of rounding to nearest. The
floor is the time of the layer's forward pass and of one Hessian per expert at the rate of a large matrix product on the
same device, nothing else counted.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor, nn

from mxfx.formats import parse
from mxfx.graph.program import Program
from mxfx.graph.trace import trace
from mxfx.passes import Annotate, RaiseAttention, RaiseNorm, RaiseRope, Rule
from mxfx.passes.gptq import Gptq
from mxfx.rewrite import Context, PassRecord, Selector, apply
from tools.bench.measuring import arguments_of, machine, table, write


@dataclass(frozen=True)
class Shape:
    """One layer: hidden and inner size, experts and how many a token chooses, heads and key-value heads of 128."""

    hidden: int
    inner: int
    experts: int
    chosen: int
    heads: int
    kv_heads: int
    head_dim: int = 128


_SHAPES = {
    "qwen3-30b-a3b": Shape(2048, 768, 128, 8, 32, 4),
    "gpt-oss-120b-like": Shape(2880, 2880, 128, 4, 64, 8, 64),
    "tiny": Shape(64, 32, 8, 2, 4, 2, 16),
}
_VOCABULARY = 1024


def main() -> None:
    args = _arguments()
    print("  ".join(f"{k}={v}" for k, v in machine().items()), flush=True)
    name = "tiny" if args.quick else args.shape
    shape, device = _SHAPES[name], torch.device(args.device)
    torch.manual_seed(args.seed)
    program = _annotated(_model(shape, args.length, args.dtype).to(device), args.format)
    ids = torch.randint(0, _VOCABULARY, (args.samples, args.length))
    floor = _floor_seconds(shape, ids.numel(), args.dtype, device)
    print(f"{name}: {ids.shape[0]} x {ids.shape[1]} tokens, floor {floor:.3f} s", flush=True)
    rows = []
    for method, role in (("whole layer", "mlp, attention"), ("attention alone", "attention")):
        gptq = Gptq(select=Selector(role=role), batch_size=args.batch_size, refine=args.refine)
        rows.append({"method": method, **_measured(gptq, program, ids, device, args.repeat)})
        print(rows[-1], flush=True)
    print(table(rows))
    found = {"machine": machine(), "shape": name, "tokens": list(ids.shape), "floor": floor, "rows": rows}
    write(found, args.json)


def _model(shape: Shape, length: int, dtype: torch.dtype) -> nn.Module:
    config = transformers.Qwen3MoeConfig(
        vocab_size=_VOCABULARY,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        moe_intermediate_size=shape.inner,
        num_hidden_layers=1,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        num_experts=shape.experts,
        num_experts_per_tok=shape.chosen,
        max_position_embeddings=max(length, 256),
    )
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def _annotated(model: nn.Module, fmt: str) -> Program:
    program = trace(model)
    rule = Rule(role="mlp, attention", weight=parse(fmt))
    for pass_ in (RaiseNorm(), RaiseRope(), RaiseAttention(), Annotate((rule,))):
        program = apply(pass_, program).program
    return program


def _measured(gptq: Gptq, program: Program, ids: Tensor, device: torch.device, repeat: int) -> dict[str, object]:
    seconds, record = [], PassRecord(gptq.name)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(repeat + 1):
        started = time.perf_counter()
        record = apply(gptq, program, Context(device=device, tokens=lambda: ids)).record
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else float("nan")
    experts: list[dict] = record.details["experts"]  # type: ignore[assignment]
    linears: list[dict] = record.details["linears"]  # type: ignore[assignment]
    return {
        "s": statistics.median(seconds[1:]),
        "first s": seconds[0],
        "peak GB": peak,
        "least tokens": min((row["fewest_tokens"] for row in experts), default=0),
        "own Hessians": sum(row["own_hessian"] for row in experts),
        "loss / nearest": sum(row["loss"] for row in linears) / sum(row["rtn_loss"] for row in linears),
    }


def _floor_seconds(shape: Shape, tokens: int, dtype: torch.dtype, device: torch.device) -> float:
    """Forward pass and Hessians at the rate of a large product; twice the multiplications are the operations."""
    attention = shape.hidden * shape.head_dim * (2 * shape.heads + 2 * shape.kv_heads)
    forward = attention + shape.chosen * 3 * shape.hidden * shape.inner
    moments = shape.chosen * (shape.hidden**2 + shape.inner**2) + shape.hidden**2 + (shape.heads * shape.head_dim) ** 2
    size = 8192 if device.type == "cuda" else 512
    a = torch.randn(size, size, dtype=dtype, device=device)
    times = []
    for _ in range(3):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return tokens * (forward + moments) * min(times) / size**3


def _arguments() -> argparse.Namespace:
    parser = arguments_of(__doc__ or "")
    parser.add_argument("--shape", choices=_SHAPES, default="tiny")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--format", default="mxint4@32/mse")
    parser.add_argument("--refine", type=int, default=0)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name), default=torch.bfloat16)
    return parser.parse_args()


if __name__ == "__main__":
    main()
