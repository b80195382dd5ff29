"""Activations that lie on an MX grid as E4M3 bytes and one power of two a row: exact, and what FP8 tensor cores take.

A kernel that sees a whole row writes them at once. One that sees a few blocks of it writes each block in units of its
own, and its exponent, and `align_rows` brings all blocks of a row to that of the largest.

Importable only where `triton` is.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxfx.algorithms.launch import KEPT_SHAPES, Launch
from mxfx.formats import Format
from mxfx.ops.kernels.packed_triton import e4m3_bits, of_e4m3
from mxfx.ops.kernels.rounding_triton import grid_of, quantize_tile

#: Elements of one program, where a row has fewer; a thread's share of them.
TILE_ELEMENTS = 4096
PER_THREAD = 32
#: Where nothing is rounded, blocks are only how a program walks a row.
PLAIN_BLOCK = 32


def rows_to_e4m3(x: Tensor, payload: Tensor, row_scales: Tensor, inexact: Tensor, fmt: Format | None = None) -> None:
    """Write rows of `x` (m, k), contiguous, as E4M3 bytes, uint8 (m, k), and their powers of two, float32 (m,).

    With `fmt`, whose blocks are powers of two that divide k, `x` is first rounded onto its grid. `inexact`, int64 (1,),
    grows by the rows of which E4M3 does not hold every entry; those are rounded to nearest.
    """
    _launch_rows(x.shape, x.dtype, x.device, fmt)(x, payload, row_scales, inexact)


def align_rows(payload: Tensor, block_scales: Tensor, row_scales: Tensor, inexact: Tensor) -> None:
    """Bring the blocks of `payload`, uint8 (m, k), from their own powers of two to one a row, in place.

    `block_scales`, uint8 (m, blocks), holds exponents + 127; `row_scales` and `inexact` are as for `rows_to_e4m3`.
    """
    _launch_align(payload.shape, block_scales.shape[1], payload.device)(payload, block_scales, row_scales, inexact)


@lru_cache(maxsize=KEPT_SHAPES)
def _launch_rows(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, fmt: Format | None) -> Launch:
    rows, width = shape
    block = PLAIN_BLOCK if fmt is None or fmt.block is None else fmt.block
    constants = {"B": block, "GRID": fmt and grid_of(fmt, dtype)}
    return _launch(_rows_kernel, rows, width, block, constants)


@lru_cache(maxsize=KEPT_SHAPES)
def _launch_align(shape: tuple[int, ...], blocks: int, device: torch.device) -> Launch:
    rows, width = shape
    return _launch(_align_kernel, rows, width, width // blocks, {"B": width // blocks})


def _launch(kernel: triton.JITFunction, rows: int, width: int, block: int, constants: dict[str, object]) -> Launch:
    blocks = triton.next_power_of_2(triton.cdiv(width, block))
    tile = max(TILE_ELEMENTS // (blocks * block), 1)
    return Launch(
        kernel,
        lambda at_a_time: triton.cdiv(rows, tile),
        (rows, width),
        {"TILE": tile, "BLOCKS": blocks, **constants},
        num_warps=min(max(tile * blocks * block // (32 * PER_THREAD), 1), 16),
    )


@triton.jit
def _rows_kernel(
    x_ptr,
    payload_ptr,
    scales_ptr,
    inexact_ptr,
    rows,
    width,
    TILE: tl.constexpr,
    BLOCKS: tl.constexpr,
    B: tl.constexpr,
    GRID: tl.constexpr,
):
    """One program, `TILE` rows of `BLOCKS` blocks, one below the other."""
    line = tl.arange(0, TILE * BLOCKS)
    row = tl.program_id(0) * TILE + line // BLOCKS
    column = (line % BLOCKS)[:, None] * B + tl.arange(0, B)[None, :]
    inside = (row < rows)[:, None] & (column < width)
    at = row.to(tl.int64)[:, None] * width + column
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if GRID is not None:
        x = quantize_tile(x, GRID, x_ptr.dtype.element_ty).to(tl.float32)
    scale = tl.reshape(scale_below(largest_bits(x)), (TILE, BLOCKS))
    # A scale grows with the largest entry: the row's is the largest of its blocks'.
    of_row = tl.max(scale, axis=1)
    each = tl.reshape(tl.broadcast_to(of_row[:, None], (TILE, BLOCKS)), (TILE * BLOCKS,))
    payload, exact = e4m3_bits(x * power_below(each)[:, None])
    tl.store(payload_ptr + at, payload.to(tl.uint8), mask=inside)
    store_rows(scales_ptr, inexact_ptr, rows, of_row, tl.reshape(tl.min(exact, axis=1), (TILE, BLOCKS)), TILE)


@triton.jit
def _align_kernel(
    payload_ptr,
    blocks_ptr,
    scales_ptr,
    inexact_ptr,
    rows,
    width,
    TILE: tl.constexpr,
    BLOCKS: tl.constexpr,
    B: tl.constexpr,
):
    """One program, `TILE` rows of `BLOCKS` blocks, one below the other."""
    line = tl.arange(0, TILE * BLOCKS)
    row = tl.program_id(0) * TILE + line // BLOCKS
    block = line % BLOCKS
    column = block[:, None] * B + tl.arange(0, B)[None, :]
    inside = (row < rows)[:, None] & (column < width)
    at = row.to(tl.int64)[:, None] * width + column
    there = (row < rows) & (block * B < width)
    scale = tl.load(blocks_ptr + row.to(tl.int64) * (width // B) + block, mask=there, other=1).to(tl.int32)
    of_row = tl.max(tl.reshape(scale, (TILE, BLOCKS)), axis=1)
    each = tl.reshape(tl.broadcast_to(of_row[:, None], (TILE, BLOCKS)), (TILE * BLOCKS,))
    factor = (tl.maximum(127 + scale - each, 1) << 23).to(tl.float32, bitcast=True)
    x = of_e4m3(tl.load(payload_ptr + at, mask=inside, other=0)) * factor[:, None]
    payload, exact = e4m3_bits(x)
    tl.store(payload_ptr + at, payload.to(tl.uint8), mask=inside)
    store_rows(scales_ptr, inexact_ptr, rows, of_row, tl.reshape(tl.min(exact, axis=1), (TILE, BLOCKS)), TILE)


@triton.jit
def largest_bits(x):
    """The bits of the largest magnitude of each line of a float32 tile."""
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFF_FFFF, axis=1)


@triton.jit
def scale_below(largest):
    """Exponent + 127 of the scale under which a magnitude, given by its bits, comes to lie in [128, 256)."""
    return tl.minimum(tl.maximum((largest >> 23) - 7, 1), 253)


@triton.jit
def power_below(scale):
    """What `scale_below` divides by, inverted, float32."""
    return ((254 - scale) << 23).to(tl.float32, bitcast=True)


@triton.jit
def blocks_to_e4m3(x, FORMAT_BLOCK: tl.constexpr):
    """A tile (rows, width) as E4M3 bits in units of each block's own power of two, and their exponents + 127."""
    rows: tl.constexpr = x.shape[0]
    width: tl.constexpr = x.shape[1]
    x = tl.reshape(x, (rows * (width // FORMAT_BLOCK), FORMAT_BLOCK))
    scale = scale_below(largest_bits(x))
    payload, _ = e4m3_bits(x * power_below(scale)[:, None])
    return tl.reshape(payload, (rows, width)), tl.reshape(scale, (rows, width // FORMAT_BLOCK))


@triton.jit
def store_rows(scales_ptr, inexact_ptr, rows, scale, exact, TILE: tl.constexpr):
    """Write the powers of two of `TILE` rows, and count those of which a part, (TILE, parts), is not exact."""
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    tl.store(scales_ptr + row, (scale << 23).to(tl.float32, bitcast=True), mask=row < rows)
    beyond = tl.sum(1 - tl.min(exact, axis=1), axis=0)
    if beyond > 0:
        tl.atomic_add(inexact_ptr, beyond.to(tl.int64))
