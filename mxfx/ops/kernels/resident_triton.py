"""Some rows that stay on a multiprocessor, times packed integers of four bits that stream past them.

`skinny_triton` reads the rows again for each few channels, which is more than it reads of the weights. Here a program
reads a piece of the rows once, keeps it in shared memory, and takes many tiles of channels. Weights are decoded in the
registers that tensor cores read. Products are exact and summed in float32: by a program over its piece, and where there
are several pieces, by a second kernel in their order.

Importable only where `triton` is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxfx.algorithms.launch import KEPT_SHAPES, Launch
from mxfx.formats import Format
from mxfx.ops.kernels.early_triton import starts_early, wait
from mxfx.ops.kernels.integer_triton import laid_out, side_by_side
from mxfx.ops.kernels.limits import RESIDENT_PIECE as PIECE
from mxfx.ops.kernels.packed_triton import narrowed, power
from mxfx.ops.kernels.skinny_triton import _added_of_four


@dataclass(frozen=True)
class Tiling:
    """Channels of a tile; warps, which share a piece of the rows; tiles whose loads are ahead."""

    channels: int
    warps: int
    stages: int


TILING = Tiling(16, 8, 3)
#: Results that a program of the second kernel sums.
SUMMED = 1024


def multiply_resident_rows(
    x: Tensor,
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    biases: Sequence[Tensor],
    residual: Tensor | None,
    fmt: Format,
    out: Tensor,
    tiling: Tiling = TILING,
) -> None:
    """Write linears of one input side by side to `out` (m, Σ n), contiguous, and add `residual` (m, Σ n), if given.

    x is bfloat16 (m, k), contiguous, and what `limits.takes_resident_rows` takes; the rest as in `multiply_integers`.
    """
    rows, width = x.shape
    pieces = width // PIECE
    sums = out
    if pieces > 1:
        sums = torch.empty((pieces, rows, out.shape[1]), dtype=torch.float32, device=x.device)

    def launch(sizes: tuple[int, ...], start: int) -> Launch:
        added = (bool(biases), residual is not None and pieces == 1)
        return _launch(rows, width, sizes, out.shape[1], start, x.device, *added, fmt, tiling)

    halfwords = [c.view(torch.int16) for c in codes]
    side_by_side(launch, x, x, halfwords, scales, biases, None if pieces > 1 else residual, sums)
    if pieces > 1:
        added = out if residual is None else residual
        _launch_sum(out.numel(), pieces, rows, x.device, residual is not None)(sums, added, out)


@lru_cache(maxsize=KEPT_SHAPES)
def _launch(
    rows: int,
    width: int,
    sizes: tuple[int, ...],
    out_width: int,
    start: int,
    device: torch.device,
    bias: bool,
    residual: bool,
    fmt: Format,
    tiling: Tiling,
) -> Launch:
    assert fmt.block is not None
    tiles, places = laid_out(sizes, tiling.channels)
    pieces = width // PIECE
    early = starts_early(device, rows)
    return Launch(
        _resident_kernel,
        lambda at_a_time: pieces * min(tiles, max(at_a_time // pieces, 1)),
        (rows, tiles, out_width, start, *places),
        {
            "PIECE": PIECE,
            "PIECES": pieces,
            "ROWS": max(triton.next_power_of_2(rows), 16),
            "CHANNELS": tiling.channels,
            "SPLITS": tiling.warps,
            "BLOCK": fmt.block,
            "BIAS": bias,
            "RESIDUAL": residual,
            "STAGES": tiling.stages,
            "EARLY": early,
        },
        num_warps=tiling.warps,
        launch_pdl=early,
    )


@triton.jit(do_not_specialize=["rows", "tiles", "start", "size0", "size1", "size2", "second", "third"])
def _resident_kernel(
    x_ptr,
    unused_ptr,
    codes0_ptr,
    codes1_ptr,
    codes2_ptr,
    scales0_ptr,
    scales1_ptr,
    scales2_ptr,
    bias0_ptr,
    bias1_ptr,
    bias2_ptr,
    residual_ptr,
    y_ptr,
    rows,
    tiles,
    out_width,
    start,
    size0,
    size1,
    size2,
    second,
    third,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program, a piece of all rows and every so many-th tile of `CHANNELS` results; each warp a part of the piece.

    Tiles from `second` and `third` on are the other weights'. Of several pieces y is (pieces, rows, results).
    """
    wait(EARLY)
    WIDTH: tl.constexpr = PIECE * PIECES
    PART: tl.constexpr = PIECE // SPLITS
    BLOCKS: tl.constexpr = PART // BLOCK
    UNITS: tl.constexpr = BLOCK // 4
    row = tl.arange(0, ROWS)
    known = row < rows
    split = tl.arange(0, SPLITS)
    piece = tl.program_id(0) % PIECES
    y_ptr += piece.to(tl.int64) * rows * out_width
    across = (piece * PIECE + split * PART)[:, None, None] + tl.arange(0, PART)[None, None, :]
    x = tl.load(x_ptr + row[None, :, None] * WIDTH + across, mask=known[None, :, None], other=0.0)
    # Codes that share a halfword meet channels next to each other: each has a product of its own.
    even, odd = tl.split(tl.reshape(x, (SPLITS, ROWS, PART // 2, 2)))
    x0, x2 = tl.split(tl.reshape(even, (SPLITS, ROWS, PART // 4, 2)))
    x1, x3 = tl.split(tl.reshape(odd, (SPLITS, ROWS, PART // 4, 2)))
    block = tl.arange(0, BLOCKS)[None, None, :]
    unit = tl.arange(0, UNITS)[None, None, None, :]
    for tile in tl.range(tl.program_id(0) // PIECES, tiles, tl.num_programs(0) // PIECES, num_stages=STAGES):
        is_third, is_second = tile >= third, tile >= second
        codes_ptr = tl.where(is_third, codes2_ptr, tl.where(is_second, codes1_ptr, codes0_ptr))
        scales_ptr = tl.where(is_third, scales2_ptr, tl.where(is_second, scales1_ptr, scales0_ptr))
        size = tl.where(is_third, size2, tl.where(is_second, size1, size0))
        first = tl.where(is_third, third, tl.where(is_second, second, 0))
        channel = (tile - first) * CHANNELS + tl.arange(0, CHANNELS)
        real = channel < size
        line = channel.to(tl.int64) * (WIDTH // BLOCK)
        there = (piece * (PIECE // BLOCK) + split * BLOCKS)[:, None, None] + block + line[None, :, None]
        mask = real[None, :, None]
        scale = tl.load(scales_ptr + there, mask=mask, other=0)
        code = tl.load(codes_ptr + there[:, :, :, None] * UNITS + unit, mask=mask[:, :, :, None], other=0)
        scale = narrowed(power(scale.to(tl.int32)), x_ptr.dtype.element_ty)[:, :, :, None]
        total = tl.zeros((SPLITS, CHANNELS, ROWS), tl.float32)
        total = _added_of_four(code, scale, x0, 0, total)
        total = _added_of_four(code, scale, x1, 1, total)
        total = _added_of_four(code, scale, x2, 2, total)
        total = _added_of_four(code, scale, x3, 3, total)
        y = tl.sum(total, axis=0)
        if BIAS:
            bias_ptr = tl.where(is_third, bias2_ptr, tl.where(is_second, bias1_ptr, bias0_ptr))
            bias = tl.load(bias_ptr + channel, mask=real & (piece == 0), other=0.0)
            y += bias.to(tl.float32)[:, None]
        before = start + tl.where(is_third, size0 + size1, tl.where(is_second, size0, 0))
        at = row.to(tl.int64)[None, :] * out_width + before + channel[:, None]
        y = y.to(y_ptr.dtype.element_ty)
        here = real[:, None] & known[None, :]
        if RESIDUAL:
            y = (tl.load(residual_ptr + at, mask=here, other=0.0).to(tl.float32) + y.to(tl.float32)).to(y.dtype)
        tl.store(y_ptr + at, y, mask=here)


@lru_cache(maxsize=KEPT_SHAPES)
def _launch_sum(count: int, pieces: int, rows: int, device: torch.device, residual: bool) -> Launch:
    early = starts_early(device, rows)
    return Launch(
        _sum_kernel,
        lambda at_a_time: triton.cdiv(count, SUMMED),
        (count,),
        {"PIECES": pieces, "RESIDUAL": residual, "SUMMED": SUMMED, "EARLY": early},
        num_warps=4,
        launch_pdl=early,
    )


@triton.jit
def _sum_kernel(
    sums_ptr,
    residual_ptr,
    y_ptr,
    count,
    PIECES: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SUMMED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program, `SUMMED` results of all pieces."""
    wait(EARLY)
    at = tl.program_id(0) * SUMMED + tl.arange(0, SUMMED)
    here = at < count
    y = tl.zeros((SUMMED,), tl.float32)
    for piece in tl.static_range(PIECES):
        y += tl.load(sums_ptr + piece * count + at, mask=here, other=0.0)
    y = y.to(y_ptr.dtype.element_ty)
    if RESIDUAL:
        y = (tl.load(residual_ptr + at, mask=here, other=0.0).to(tl.float32) + y.to(tl.float32)).to(y.dtype)
    tl.store(y_ptr + at, y, mask=here)
