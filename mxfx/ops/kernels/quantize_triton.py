"""`fake_quantize` in one pass over memory.

Importable only where `triton` is.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxfx.algorithms.launch import KEPT_SHAPES, Launch
from mxfx.formats import Format
from mxfx.ops.kernels.addressing import as_rows, is_walkable
from mxfx.ops.kernels.rounding_triton import grid_of, quantize_tile, round_to_element, saturated

#: Elements of one program; 16 a thread leave registers for as many threads as a multiprocessor takes.
TILE_ELEMENTS = 2048
WARPS = 4


def fake_quantize_triton(x: Tensor, fmt: Format) -> Tensor:
    """`x` on the grid of `fmt`, blocks along the last axis; contiguous, same shape and dtype.

    `x` is bfloat16, float16 or float32 of any shape and strides.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    if not is_walkable(x) or fmt.block is None:
        x = x.contiguous()
    _launch(x.shape, x.stride(), x.dtype, x.device, fmt)(x, out)
    return out


@lru_cache(maxsize=KEPT_SHAPES)
def _launch(
    shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, device: torch.device, fmt: Format
) -> Launch:
    if fmt.block is None:
        return _launch_elements(math.prod(shape), dtype, fmt)
    rows = as_rows(shape, stride)
    padded = triton.next_power_of_2(fmt.block)
    per_row = triton.cdiv(rows.length, fmt.block)
    blocks = rows.count * per_row
    tile = max(TILE_ELEMENTS // padded, 1)
    return Launch(
        _quantize_kernel,
        lambda at_a_time: triton.cdiv(blocks, tile),
        (blocks, per_row, rows.length, *rows.arguments),
        {
            "TILE": tile,
            "B": fmt.block,
            "PADDED": padded,
            "FLAT": rows.flat and rows.length % fmt.block == 0,
            "GRID": grid_of(fmt, dtype),
        },
        num_warps=WARPS,
    )


def _launch_elements(count: int, dtype: torch.dtype, fmt: Format) -> Launch:
    return Launch(
        _round_kernel,
        lambda at_a_time: triton.cdiv(count, TILE_ELEMENTS),
        (count,),
        {"TILE": TILE_ELEMENTS, "GRID": grid_of(fmt, dtype)},
        num_warps=WARPS,
    )


@triton.jit
def row_index(row, size1, size2):
    """Where row number `row` lies along the three axes of `Rows`."""
    outer = row // size2
    index0 = outer // size1
    return index0, outer - index0 * size1, row - outer * size2


@triton.jit
def row_offset(row, size1, size2, stride0, stride1, stride2):
    """Where row number `row` starts, in elements, int64."""
    index0, index1, index2 = row_index(row, size1, size2)
    return index0.to(tl.int64) * stride0 + index1.to(tl.int64) * stride1 + index2.to(tl.int64) * stride2


@triton.jit
def _quantize_kernel(
    x_ptr,
    y_ptr,
    blocks,
    per_row,
    length,
    size1,
    size2,
    stride0,
    stride1,
    stride2,
    TILE: tl.constexpr,
    B: tl.constexpr,
    PADDED: tl.constexpr,
    FLAT: tl.constexpr,
    GRID: tl.constexpr,
):
    """One program, `TILE` consecutive blocks; `y` is contiguous."""
    start = tl.program_id(0).to(tl.int64) * TILE
    local = tl.arange(0, TILE)
    lane = tl.arange(0, PADDED)
    if FLAT:
        inside = (local < blocks - start)[:, None]
        if PADDED != B:
            inside = inside & (lane < B)[None, :]
        source = local[:, None] * B + lane[None, :]
        target = source
        x_ptr += start * B
        y_ptr += start * B
    else:
        block = (start + local).to(tl.int32)
        row = block // per_row
        column = (block - row * per_row)[:, None] * B + lane[None, :]
        inside = (block < blocks)[:, None] & (lane < B)[None, :] & (column < length)
        source = row_offset(row, size1, size2, stride0, stride1, stride2)[:, None] + column
        target = row.to(tl.int64)[:, None] * length + column
    x = tl.load(x_ptr + source, mask=inside, other=0.0)
    y = quantize_tile(x.to(tl.float32), GRID, y_ptr.dtype.element_ty)
    tl.store(y_ptr + target, y, mask=inside)


@triton.jit
def _round_kernel(
    x_ptr,
    y_ptr,
    count,
    TILE: tl.constexpr,
    GRID: tl.constexpr,
):
    """Elements without a shared scale."""
    start = tl.program_id(0).to(tl.int64) * TILE
    local = tl.arange(0, TILE)
    inside = local < count - start
    x = tl.load(x_ptr + start + local, mask=inside, other=0.0).to(tl.float32)
    y = saturated(round_to_element(x, GRID), y_ptr.dtype.element_ty, GRID)
    tl.store(y_ptr + start + local, y, mask=inside)
