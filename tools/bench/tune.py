"""Launch parameters of the transforming kernel: which tile, how many threads, stages and blocks side by side.

    python tools/bench/tune.py [--json FILE] [--quick]

Microseconds for 8192² bfloat16 with MXINT4 `mse` behind the transform (H: Hadamard by signs; T: a matrix for every
block, in float32 or, "bf16", in x's dtype), a row for each set of parameters, and the best set for each case. What no
case can be compiled for shows the error. Compilation runs in as many processes as there are cores.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import torch
from torch import Tensor

import mxfx.ops.kernels  # noqa: F401  (registers the ops)
from mxfx.algorithms.hadamard import hadamard_matrix
from tools.bench.measuring import finish, kernel_ms, options, require_cuda

SIZE = 8192
NARROW = ("H 32", "H 64", "T 32", "T 64", "T 32 bf16", "T 64 bf16")
WIDE = ("H 128", "T 128", "T 128 bf16", "H 128, format 32", "T 128 bf16, format 32")
#: Cases, and the constants of `transform_triton` that differ from those in the code.
VARIANTS: tuple[tuple[tuple[str, ...], dict[str, int | None]], ...] = (
    (("quantize 32", "quantize 64", "quantize 128", *NARROW, *WIDE), {}),
    (("T 32", "T 32 bf16"), {"GROUP_WIDTH": 32}),
    (("T 32", "T 32 bf16", "T 64 bf16"), {"GROUP_WIDTH": 128}),
    (NARROW, {"STAGES": 1}),
    (NARROW, {"STAGES": 3}),
    (NARROW, {"TILE_ELEMENTS": 8192}),
    (NARROW, {"TILE_ELEMENTS": 8192, "ELEMENTS_PER_THREAD": 64}),
    (NARROW, {"TILE_ELEMENTS": 8192, "ELEMENTS_PER_THREAD": 64, "STAGES": 1}),
    (NARROW, {"ELEMENTS_PER_THREAD": 16}),
    (WIDE, {"ELEMENTS_PER_THREAD": 64}),
    (WIDE, {"ELEMENTS_PER_THREAD": 64, "REGISTERS_OF_WIDE": 168}),
    (WIDE, {"ELEMENTS_PER_THREAD": 64, "STAGES": 1}),
    (WIDE, {"STAGES": 1}),
    (WIDE, {"REGISTERS_OF_WIDE": 80}),
    (WIDE, {"STAGES": 3}),
)


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


def run(case: str, constants: dict[str, int | None], *, timed: bool) -> object:
    """One case with given constants: microseconds, or nothing but its compilation; or the name of its error."""
    from mxfx.ops.kernels import transform_triton

    before = {name: getattr(transform_triton, name) for name in constants}
    try:
        for name, value in constants.items():
            setattr(transform_triton, name, value)
        transform_triton._launch.cache_clear()
        call = call_of(case, torch.randn(SIZE, SIZE, device="cuda").to(torch.bfloat16))
        if timed:
            return round(kernel_ms(call) * 1e3, 1)
        return bool(call().isfinite().all())
    except Exception as error:
        return type(error).__name__
    finally:
        for name, value in before.items():
            setattr(transform_triton, name, value)
        transform_triton._launch.cache_clear()


def compile_all(variants: list[tuple[str, dict[str, int | None]]]) -> None:
    """Fill Triton's cache."""
    workers = max(min(os.cpu_count() or 1, 14), 1)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for future in [pool.submit(run, case, constants, timed=False) for case, constants in variants]:
            future.result()


def main() -> None:
    arguments = options("Launch parameters of the transforming kernel")
    require_cuda()
    variants = VARIANTS[:4] if arguments.quick else VARIANTS
    compile_all([(case, constants) for cases, constants in variants for case in cases])
    rows: list[dict[str, object]] = []
    for cases, constants in variants:
        for case in cases:
            said = ", ".join(f"{name}={value}" for name, value in constants.items())
            rows.append({"case": case, "constants": said or "as in the code", "µs": run(case, constants, timed=True)})
    order = list(dict.fromkeys(row["case"] for row in rows))
    rows.sort(key=lambda row: (order.index(row["case"]), row["µs"] if isinstance(row["µs"], float) else 1e9))
    finish(rows, arguments.json)


if __name__ == "__main__":
    main()
