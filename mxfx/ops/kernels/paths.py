"""Which path a product with packed weights takes on a CUDA device: a function of facts, which needs no device.

`packed_cuda` goes the path that is said here; `ways` tells it in words.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from functools import lru_cache

import torch

from mxfx.formats import Format
from mxfx.ops.fp8 import not_carried
from mxfx.ops.kernels import limits


class Path(Enum):
    """How rows meet a packed weight."""

    #: Four products of codes at an instruction of the ordinary cores.
    INTEGERS = auto()
    #: Codes on the tensor cores for int8.
    INTEGER_TILES = auto()
    #: Values meet codes as they lie, in float32.
    CODES = auto()
    #: Values meet codes that are decoded on their way to tensor cores.
    TENSOR_CORES = auto()
    #: Rows of E4M3, sums of instructions in float32.
    EXACT = auto()
    #: Rows of E4M3, cuBLAS's sums.
    FAST = auto()
    #: The weight is decoded before a GEMM.
    DECODED = auto()
    #: No kernel.
    DEFINITION = auto()


@dataclass(frozen=True)
class Plan:
    """A path, and why it is that one."""

    path: Path
    reason: str


@lru_cache(maxsize=4096)
def plan(
    weight: Format,
    x: Format | None,
    fused: bool,
    rows: int,
    width: int,
    channels: int,
    dtype: torch.dtype,
    sums: str | None = None,
    exact_sums: bool = False,
    has_e4m3: bool = True,
) -> Plan:
    """The path of `rows` of `width` by weights of `channels` results in all.

    Args:
        weight: format of packed codes.
        x: format of the rows; None if none is known.
        fused: whether a kernel that rounds them onto it right before can give them as integers.
        dtype: of the rows, where they are not E4M3, and of the results.
        sums: of `multiply-in-fp8`, for rows that are E4M3 where there are many; None for others.
        exact_sums: whether the device adds FP8 products in float32 (`e4m3_product.sums_in_float32`).
        has_e4m3: whether its tensor cores take E4M3 at all.
    """
    if dtype not in limits.DTYPES:
        return Plan(Path.DEFINITION, f"kernels compute in up to float32, not {dtype}")
    if not rows or not width:
        return Plan(Path.DEFINITION, "there is nothing to multiply")
    if not limits.takes_packed(weight, width):
        return Plan(Path.DEFINITION, f"no kernel decodes rows of {width} in {weight}")
    if fused and x is not None and limits.takes_integers(weight, x, rows, width):
        if rows <= limits.FEW_INTEGERS:
            return Plan(Path.INTEGERS, f"up to {limits.FEW_INTEGERS} rows, of codes that int8 holds")
        # Instead of codes that are decoded as they arrive, one weight after the other. On an H200 at 16 rows (commit
        # cd81b09, not measured since) integers took .87 and .71 of that time at q·k·v of a 1B and an 8B shape, 1.0 to
        # 1.35 of it at o, gate·up and down.
        if width < channels <= 2 * width:
            return Plan(Path.INTEGER_TILES, f"up to {limits.INTEGER_ROWS} rows, and somewhat more results than inputs")
    if limits.takes_few_rows(weight, rows):
        return Plan(Path.CODES, f"up to {limits.FEW_ROWS} rows")
    if limits.takes_some_rows(weight, rows, dtype):
        return Plan(Path.TENSOR_CORES, f"up to {limits.SOME_ROWS} rows")
    if sums is None:
        return Plan(Path.DECODED, "its rows are not E4M3")
    if (why := not_carried(weight)) is not None:
        return Plan(Path.DEFINITION, f"its weight is {weight}, {why}")
    # The kernel that sums exactly asks it of inputs alone, whose rows it describes to the device.
    if width % limits.ALIGNED or (sums == "fast" and channels % limits.ALIGNED):
        return Plan(Path.DECODED, f"an FP8 GEMM takes sizes that are multiples of {limits.ALIGNED}")
    if sums == "exact" and exact_sums:
        return Plan(Path.EXACT, "this GPU adds FP8 products in float32")
    if sums == "fast" and has_e4m3:
        return Plan(Path.FAST, "cuBLAS's sums are asked for")
    if sums == "exact":
        why = 'this GPU does not sum FP8 products exactly; [emit] sums = "fast" takes its sums'
    else:
        exactly = f"FP8 does not sum {weight} by {x or 'its input'} exactly"
        why = exactly if sums == "wide" else "this GPU has no FP8"
    return Plan(Path.DECODED, why)
