"""Launch parameters of the transforming kernel: which tile, how many elements a thread, stages and registers.

    python -m tools.bench.tune [--json FILE] [--quick]

Microseconds for 8192² bfloat16 with MXINT4 `mse` behind the transform (H: Hadamard by signs; T: a matrix for every
block, in float32 or, "bf16", in x's dtype), a row for each set of parameters, the best first. What cannot be compiled
shows the error. Compilation runs in as many processes as there are cores.
"""

from __future__ import annotations

import math
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, replace

import torch
from torch import Tensor

import mxfx.ops.kernels  # noqa: F401  (registers the ops)
from mxfx.algorithms.hadamard import hadamard_matrix
from tools.bench.measuring import finish, kernel_ms, options, require_cuda

SIZE = 8192
NARROW = ("H 32", "H 64", "T 32", "T 64", "T 32 bf16", "T 64 bf16")
WIDE = ("H 128", "T 128 bf16", "H 128, format 32", "T 128 bf16, format 32")
WIDE_IN_TERMS = ("T 128", "T 128, format 32")
#: Cases, and what changes in the tiling of each.
Variant = tuple[tuple[str, ...], "dict[str, int | None]"]
VARIANTS: tuple[Variant, ...] = (
    (("quantize 32", "quantize 64", "quantize 128"), {}),
    *((NARROW, change) for change in (
        {}, {"stages": 2}, {"stages": 3}, {"stages": 4},
    )),
    *((("T 32", "T 64"), change) for change in (
        {"elements": 2048, "per_thread": 16}, {"elements": 8192, "per_thread": 64},
    )),
    *((WIDE, change) for change in (
        {}, {"elements": 16384}, {"registers": 168}, {"registers": None},
    )),
    *((WIDE_IN_TERMS, change) for change in (
        {}, {"stages": 1}, {"elements": 16384, "stages": 1}, {"elements": 16384}, {"elements": 32768, "stages": 1},
        {"stages": 1, "registers": 168},
    )),
)  # fmt: skip


def tiling_of(case: str) -> tuple[str, int]:
    """Where `TILINGS` keeps a case's."""
    kind, block = case.split(",")[0].split()[:2]
    return {"H": "signs", "T": "one term" if "bf16" in case else "two terms"}.get(kind, "none"), int(block)


def call_of(case: str, x: Tensor) -> Callable[[], Tensor]:
    """What a case runs."""
    ops = torch.ops.mxfx_kernels
    kind, block = case.split(",")[0].split()[:2]
    fmt = "mxint4@32/mse" if case.endswith("format 32") else f"mxint4@{block}/mse"
    if kind == "quantize":
        return lambda: ops.fake_quantize(x, fmt, -1)
    if kind == "H":
        signs = hadamard_matrix(int(block), torch.float32, x.device)
        return lambda: ops.transform_quantize(x, signs, fmt, True)
    own = torch.randn(x.shape[-1] // int(block), int(block), int(block), device=x.device) / int(block) ** 0.5
    own = own.to(x.dtype) if "bf16" in case else own
    return lambda: ops.transform_quantize(x, own, fmt, False)


def run(case: str, change: dict[str, int | None], *, timed: bool) -> object:
    """One case with its tiling changed: microseconds, or nothing but its compilation; or the name of its error."""
    from mxfx.ops.kernels import transform_triton

    tilings, key = transform_triton.TILINGS, tiling_of(case)
    before = tilings[key]
    try:
        tilings[key] = replace(before, **change)  # type: ignore[arg-type]
        transform_triton._launch.cache_clear()
        call = call_of(case, torch.randn(SIZE, SIZE, device="cuda").to(torch.bfloat16))
        if timed:
            return round(kernel_ms(call) * 1e3, 1)
        return bool(call().isfinite().all())
    except Exception as error:
        return type(error).__name__
    finally:
        tilings[key] = before
        transform_triton._launch.cache_clear()


def jobs_of(variants: tuple[Variant, ...]) -> dict[tuple[str, str], dict[str, int | None]]:
    """By case and its whole tiling, in the order of `Tiling`, what changes; each once."""
    from mxfx.ops.kernels.transform_triton import TILINGS

    found: dict[tuple[str, str], dict[str, int | None]] = {}
    for cases, change in variants:
        for case in cases:
            tiling = astuple(replace(TILINGS[tiling_of(case)], **change))  # type: ignore[arg-type]
            found.setdefault((case, str(tiling)), change)
    return found


def compile_all(variants: tuple[Variant, ...] = VARIANTS) -> None:
    """Fill Triton's cache."""
    workers = max(min(os.cpu_count() or 1, 14), 1)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = [
            pool.submit(run, case, change, timed=False) for (case, _), change in reversed(jobs_of(variants).items())
        ]
        for job in jobs:
            job.result()


def time_all(variants: tuple[Variant, ...] = VARIANTS) -> list[dict[str, object]]:
    """A row a case and variant, the fastest of each case first."""
    rows: list[dict[str, object]] = [
        {"case": case, "tiling": tiling, "µs": run(case, change, timed=True)}
        for (case, tiling), change in jobs_of(variants).items()
    ]
    order = list(dict.fromkeys(row["case"] for row in rows))
    return sorted(
        rows, key=lambda row: (order.index(row["case"]), row["µs"] if isinstance(row["µs"], float) else math.inf)
    )


def main() -> None:
    arguments = options("Launch parameters of the transforming kernel")
    require_cuda()
    variants = VARIANTS[:4] if arguments.quick else VARIANTS
    compile_all(variants)
    finish(time_all(variants), arguments.json)


if __name__ == "__main__":
    main()
