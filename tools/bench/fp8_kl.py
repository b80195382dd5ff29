"""How far the logits of a saved program with products in FP8 lie from those of its simulation, beside two libraries.

    python -m tools.bench.fp8_kl SAVED --text FILE|DIR [--tokens 8192] [--length 1024] [--device cuda] [--json FILE]

`SAVED` is a folder that mxfx saved, packed. The simulation decodes its weights once and multiplies in the model's
dtype. Each row: mean and largest KL in nats from the simulation, its 99 % quantile, how often the most likely token is
the same, and the largest difference of two logits. Beside the FP8 path stand the simulation again with each library of
products that torch has (cuBLAS, cuBLASLt), and one window at a time instead of all: what another order of sums does to
a model whose activations are rounded. `inexact`: rows that E4M3 did not hold.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from mxfx import api
from mxfx.calibration.datasets import load_tokens
from mxfx.config.emit import EmitConfig
from mxfx.driver.pretrained import load_tokenizer
from mxfx.export.unpack import unpacked
from mxfx.graph.program import Program
from mxfx.ops.kernels.packed import inexact_count
from mxfx.pipeline.emit import emitted
from mxfx.runtime.causal_lm import EmittedCausalLM, as_causal_lm
from tools.bench.measuring import arguments_of, finish


def main() -> None:
    args = _arguments()
    device = torch.device(args.device)
    program = api.load(args.saved)
    tokenizer = load_tokenizer(str(args.saved))
    samples = max(args.tokens // args.length, 1)
    ids = load_tokens(args.text, tokenizer, samples=samples, length=args.length, seed=0).ids.to(device)
    simulation = _model(unpacked(program), device, packed=False)
    wanted = _logits(simulation, ids, args.batch)
    rows: list[dict[str, object]] = [_row("simulation, once more", wanted, _logits(simulation, ids, args.batch), 0)]
    rows.append(_row("simulation, window by window", wanted, _logits(simulation, ids, 1), 0))
    if device.type == "cuda":
        for library in ("cublas", "cublaslt"):
            before = torch.backends.cuda.preferred_blas_library(library)
            rows.append(_row(f"simulation, {library}", wanted, _logits(simulation, ids, args.batch), 0))
            torch.backends.cuda.preferred_blas_library(before)
    del simulation
    counted = inexact_count()
    found = _logits(_model(program, device, packed=True), ids, args.batch)
    rows.append(_row("products in FP8", wanted, found, inexact_count() - counted))
    finish(rows, args.json)


def _model(program: Program, device: torch.device, *, packed: bool) -> EmittedCausalLM:
    """Emitted for a GPU, wherever it runs."""
    return as_causal_lm(emitted(program, device, EmitConfig(device="cuda", packed=packed)), device)


def _logits(model: EmittedCausalLM, ids: Tensor, batch: int) -> list[Tensor]:
    with torch.no_grad():
        return [row for some in ids.split(batch) for row in model(some).logits.float().log_softmax(-1).cpu()]


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
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="cuda")
    return parser.parse_args()


if __name__ == "__main__":
    main()
