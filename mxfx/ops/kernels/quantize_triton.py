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

from mxfx.formats import Format
from mxfx.ops.kernels.addressing import as_rows, is_walkable
from mxfx.ops.kernels.launch import KEPT_SHAPES, Launch
from mxfx.ops.kernels.rounding_triton import clamp, grid_constants, quantize_tile, round_to_element

#: Elements of one program; 32 a thread keep four 16-byte loads of bfloat16 in flight.
TILE_ELEMENTS = 4096
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
            **grid_constants(fmt, dtype),
        },
        num_warps=WARPS,
    )


def _launch_elements(count: int, dtype: torch.dtype, fmt: Format) -> Launch:
    constants = grid_constants(fmt, dtype)
    names = ("LOW", "HIGH", "MIN_BINADE", "MAGIC", "FLOAT", "LARGEST")
    return Launch(
        _round_kernel,
        lambda at_a_time: triton.cdiv(count, TILE_ELEMENTS),
        (count,),
        {"TILE": TILE_ELEMENTS, **{name: constants[name] for name in names}},
        num_warps=WARPS,
    )


@triton.jit
def row_offset(row, size1, size2, stride0, stride1, stride2):
    """Where row number `row` starts, in elements, int64."""
    outer = row // size2
    index0 = outer // size1
    offset = index0.to(tl.int64) * stride0 + (outer - index0 * size1).to(tl.int64) * stride1
    return offset + (row - outer * size2).to(tl.int64) * stride2


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
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    MIN_BINADE: tl.constexpr,
    MAGIC: tl.constexpr,
    OFFSET: tl.constexpr,
    THRESHOLD: tl.constexpr,
    CLAMP: tl.constexpr,
    LARGEST: tl.constexpr,
    FLOAT: tl.constexpr,
    MSE: tl.constexpr,
    SUM: tl.constexpr,
    UNIT: tl.constexpr,
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
    y = quantize_tile(
        x.to(tl.float32), LOW, HIGH, MIN_BINADE, MAGIC, OFFSET, THRESHOLD, CLAMP, LARGEST, FLOAT, MSE, SUM, UNIT
    )
    tl.store(y_ptr + target, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _round_kernel(
    x_ptr,
    y_ptr,
    count,
    TILE: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    MIN_BINADE: tl.constexpr,
    MAGIC: tl.constexpr,
    FLOAT: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """Elements without a shared scale."""
    start = tl.program_id(0).to(tl.int64) * TILE
    local = tl.arange(0, TILE)
    inside = local < count - start
    x = tl.load(x_ptr + start + local, mask=inside, other=0.0).to(tl.float32)
    y = clamp(round_to_element(x, LOW, HIGH, MIN_BINADE, MAGIC, FLOAT), -LARGEST, LARGEST)
    tl.store(y_ptr + start + local, y.to(y_ptr.dtype.element_ty), mask=inside)
