"""How far the logits of a saved program with products in FP8 lie from those of its simulation, beside two libraries.

    python -m tools.bench.fp8_kl SAVED --text FILE|DIR [--float MODEL] [--tokens 8192] [--length 1024]
        [--device cuda] [--json FILE]

`SAVED` is a folder that mxfx saved, packed. The simulation decodes its weights once and multiplies in the model's
dtype. Each row: mean and largest KL in nats from the simulation, its 99 % quantile, how often the most likely token is
the same, and the largest difference of two logits. Beside the FP8 path stand the simulation again with each library of
products that torch has (cuBLAS, cuBLASLt), in another order of sums (float32, the even terms and the odd ones apart),
and one window at a time instead of all: products of codes are exact in float32 in any order; and the simulation with
one in a thousand results of its linears moved by one unit in the last place, which says how much the model makes of
any difference that there is. `nats`: mean cross entropy on the text; with ``--float`` `from float`, the mean KL to that
model, which is the loss of quality of each row, and its own row beside, with sums in the other order: the same
difference in a model that rounds nothing. `inexact`: rows that E4M3 did not hold.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mxfx import api
from mxfx.calibration.datasets import load_tokens
from mxfx.config.emit import EmitConfig
from mxfx.driver.pretrained import load_model, load_tokenizer
from mxfx.export.unpack import unpacked
from mxfx.graph.program import Program
from mxfx.ops.kernels.packed import inexact_count
from mxfx.pipeline.emit import emitted
from mxfx.runtime.causal_lm import EmittedCausalLM, as_causal_lm
from tools.bench.measuring import arguments_of, finish, table

aten = torch.ops.aten


def main() -> None:
    args = _arguments()
    device = torch.device(args.device)
    program = api.load(args.saved)
    tokenizer = load_tokenizer(str(args.saved))
    samples = max(args.tokens // args.length, 1)
    ids = load_tokens(args.text, tokenizer, samples=samples, length=args.length, seed=0).ids.to(device)
    simulation = _model(unpacked(program), device, packed=False)
    wanted = _logits(simulation, ids, args.batch)
    model = load_model(str(args.float), "bfloat16").to(device) if args.float else None
    truth = _logits(model, ids, args.batch) if model else None

    def row(name: str, found: list[Tensor], inexact: int = 0) -> dict[str, object]:
        from_float = {"from float": _row(name, truth, found, 0)["mean KL"]} if truth else {}
        return _row(name, wanted, found, inexact) | {"nats": _nats(found, ids)} | from_float

    if model and truth:
        print(table([_row("float", truth, truth, 0) | {"nats": _nats(truth, ids)}]))
        with OtherSums():
            print(table([_row("float, other sums, from float", truth, _logits(model, ids, args.batch), 0)]))
        del model
    rows: list[dict[str, object]] = [row("simulation, once more", _logits(simulation, ids, args.batch))]
    rows.append(row("simulation, window by window", _logits(simulation, ids, 1)))
    if device.type == "cuda":
        for library in ("cublas", "cublaslt"):
            before = torch.backends.cuda.preferred_blas_library(library)
            rows.append(row(f"simulation, {library}", _logits(simulation, ids, args.batch)))
            torch.backends.cuda.preferred_blas_library(before)
    with OtherSums():
        rows.append(row("simulation, other sums", _logits(simulation, ids, args.batch)))
    with OneUnit():
        rows.append(row("simulation, one unit at 0.1 %", _logits(simulation, ids, args.batch)))
    del simulation
    counted = inexact_count()
    found = _logits(_model(program, device, packed=True), ids, args.batch)
    rows.append(row("products in FP8", found, inexact_count() - counted))
    found = _logits(_model(program, device, packed=True, sums="fast"), ids, args.batch)
    rows.append(row("products in FP8, fast sums", found))
    finish(rows, args.json)


class OneUnit(TorchDispatchMode):
    """One in a thousand results of each product with a weight, but of the head, moves by one unit in the last place."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        product = func in (aten.mm.default, aten.addmm.default, aten.linear.default)
        if not product or out.dtype not in (torch.bfloat16, torch.float16) or out.shape[-1] > 1 << 15:
            return out
        drawn = torch.rand(out.shape, device=out.device)
        step = (drawn < 5e-4).to(torch.int16) - (drawn > 1 - 5e-4).to(torch.int16)
        moved = (out.contiguous().view(torch.int16) + step).view(out.dtype)
        return torch.where(out == 0, out, moved)


class OtherSums(TorchDispatchMode):
    """Each product with a weight, but of the head, in float32, the even terms and the odd ones summed apart."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten.linear.default:
            x, weight, bias = args[0], args[1].mT, args[2] if len(args) > 2 else None
        elif func in (aten.mm.default, aten.addmm.default):
            *first, x, weight = args
            bias = first[0] if first else None
        else:
            return func(*args, **(kwargs or {}))
        if x.dtype != torch.bfloat16 or weight.shape[-1] > 1 << 15:
            return func(*args, **(kwargs or {}))
        wide, factors = x.float(), weight.float()
        out = wide[..., ::2] @ factors[::2] + wide[..., 1::2] @ factors[1::2]
        return (out if bias is None else out + bias).to(x.dtype)


def _model(
    program: Program, device: torch.device, *, packed: bool, sums: Literal["exact", "fast"] = "exact"
) -> EmittedCausalLM:
    """Emitted for a GPU, wherever it runs."""
    return as_causal_lm(emitted(program, device, EmitConfig(device="cuda", packed=packed, sums=sums)), device)


def _logits(model: nn.Module, ids: Tensor, batch: int) -> list[Tensor]:
    with torch.no_grad():
        return [row for some in ids.split(batch) for row in model(some).logits.float().log_softmax(-1).cpu()]


def _nats(found: list[Tensor], ids: Tensor) -> float:
    """Mean cross entropy of the tokens behind the first of each window."""
    drawn = [-row[:-1].gather(-1, one[1:, None]).mean() for row, one in zip(found, ids.cpu(), strict=True)]
    return float(torch.stack(drawn).mean())


def _row(name: str, wanted: list[Tensor], found: list[Tensor], inexact: int) -> dict[str, object]:
    kl = torch.cat([(a.exp() * (a - b)).sum(-1) for a, b in zip(wanted, found, strict=True)]).double()
    same = torch.cat([a.argmax(-1) == b.argmax(-1) for a, b in zip(wanted, found, strict=True)])
    furthest = max(float((a - b).abs().max()) for a, b in zip(wanted, found, strict=True))
    return {
        "what": name,
        "mean KL": float(kl.mean()),
        "99 %": float(kl.quantile(0.99)),
        "largest KL": float(kl.max()),
        "same token": float(same.double().mean()),
        "largest difference": furthest,
        "inexact": inexact,
    }


def _arguments() -> argparse.Namespace:
    parser = arguments_of("Logits of products in FP8 beside their simulation")
    parser.add_argument("saved", type=Path, help="folder that mxfx saved")
    parser.add_argument("--text", type=Path, required=True, help="text file, or folder of such")
    parser.add_argument("--float", help="the float model: a folder or a name")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="cuda")
    return parser.parse_args()


if __name__ == "__main__":
    main()
