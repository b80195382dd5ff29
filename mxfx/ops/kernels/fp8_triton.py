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
from mxfx.ops.fp8 import octaves_of
from mxfx.ops.kernels.packed_triton import to_e4m3
from mxfx.ops.kernels.pairs_triton import largest_of, pairs_to_e4m3, round_pairs
from mxfx.ops.kernels.rounding_triton import grid_of, quantize_tile, round_tile

#: Elements of one program, where a row has fewer; a thread's share of them.
TILE_ELEMENTS = 4096
PER_THREAD = 32
_BROKEN = tl.constexpr(254)
_NAN = tl.constexpr(0x7FC0_0000)
#: Where nothing is rounded, blocks are only how a program walks a row.
PLAIN_BLOCK = 32


def rows_to_e4m3(x: Tensor, payload: Tensor, row_scales: Tensor, inexact: Tensor, fmt: Format | None = None) -> None:
    """Write rows of `x` (m, k), contiguous, as E4M3 bytes, uint8 (m, k), and their powers of two, float32 (m,).

    With `fmt`, whose blocks are powers of two that divide k, `x` is first rounded onto its grid. `inexact`, int64 (1,),
    grows by the rows of which E4M3 does not hold every entry, or, with `fmt`, whose blocks span more octaves than it is
    sure to hold (`mxfx.ops.fp8.octaves_of`); they are rounded to nearest.
    """
    if fmt is not None and grid_of(fmt, x.dtype).pairs and x.data_ptr() % 4 == 0:
        x, payload = x.view(torch.int32), payload.view(torch.int16)
    _launch_rows(x.shape, x.dtype, x.device, fmt)(x, payload, row_scales, inexact)


def align_rows(payload: Tensor, block_scales: Tensor, row_scales: Tensor, inexact: Tensor, fmt: Format) -> None:
    """Bring the blocks of `payload`, uint8 (m, k), from their own powers of two to one a row, in place.

    `block_scales`, uint8 (m, blocks), holds exponents + 127; the rest is as for `rows_to_e4m3`.
    """
    _launch_align(payload.shape, payload.device, fmt)(payload, block_scales, row_scales, inexact)


@lru_cache(maxsize=KEPT_SHAPES)
def _launch_rows(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, fmt: Format | None) -> Launch:
    """int32: words of two bfloat16."""
    rows, width = shape
    pairs = dtype == torch.int32
    block = (PLAIN_BLOCK if fmt is None or fmt.block is None else fmt.block) // (2 if pairs else 1)
    grid = fmt and grid_of(fmt, torch.bfloat16 if pairs else dtype)
    constants = {"B": block, "OCTAVES": fmt and octaves_of(fmt), "GRID": grid}
    return _launch(_rows_kernel, rows, width, block, constants, pairs)


@lru_cache(maxsize=KEPT_SHAPES)
def _launch_align(shape: tuple[int, ...], device: torch.device, fmt: Format) -> Launch:
    assert fmt.block is not None
    rows, width = shape
    return _launch(_align_kernel, rows, width, fmt.block, {"B": fmt.block, "OCTAVES": octaves_of(fmt)})


def _launch(
    kernel: triton.JITFunction, rows: int, width: int, block: int, constants: dict[str, object], pairs: bool = False
) -> Launch:
    blocks = triton.next_power_of_2(triton.cdiv(width, block))
    elements = blocks * block * (2 if pairs else 1)
    tile = max(TILE_ELEMENTS // elements, 1)
    return Launch(
        kernel,
        lambda at_a_time: triton.cdiv(rows, tile),
        (rows, width),
        {"TILE": tile, "BLOCKS": blocks, **constants},
        num_warps=min(max(tile * elements // (32 * PER_THREAD), 1), 16),
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
    OCTAVES: tl.constexpr,
    GRID: tl.constexpr,
):
    """One program, `TILE` rows of `BLOCKS` blocks, one below the other; blocks are of `B` entries, or words of two."""
    PAIRS: tl.constexpr = x_ptr.dtype.element_ty == tl.int32
    line = tl.arange(0, TILE * BLOCKS)
    row = tl.program_id(0) * TILE + line // BLOCKS
    column = (line % BLOCKS)[:, None] * B + tl.arange(0, B)[None, :]
    inside = (row < rows)[:, None] & (column < width)
    at = row.to(tl.int64)[:, None] * width + column
    if PAIRS:
        x, unit = round_pairs(tl.load(x_ptr + at, mask=inside, other=0), GRID)
        scale = scale_below(held_bits(largest_of(x) * unit, GRID))
    else:
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        x, unit, scale = in_units(x, GRID, x_ptr.dtype.element_ty)
    of_row, depth = span_of(tl.reshape(scale, (TILE, BLOCKS)), 1)
    each = tl.reshape(tl.broadcast_to(of_row[:, None], (TILE, BLOCKS)), (TILE * BLOCKS,))
    if PAIRS:
        tl.store(payload_ptr + at, pairs_to_e4m3(x, unit * power_below(each)), mask=inside)
    else:
        x *= (unit * power_below(each))[:, None]
        tl.store(payload_ptr + at, to_e4m3(x), mask=inside)
    if GRID is not None:
        beyond = too_far(of_row, depth, OCTAVES)
    else:
        # Scaled so that the biases agree, E4M3's bits are the top 12 of a float, subnormals included.
        rest = (tl.abs(x) * (2.0**-120)).to(tl.int32, bitcast=True) & 0xFFFFF
        beyond = ((tl.max(rest, axis=1) != 0) & (each != _BROKEN)).to(tl.int32)
        beyond = tl.max(tl.reshape(beyond, (TILE, BLOCKS)), axis=1)
    store_rows(scales_ptr, inexact_ptr, rows, of_row, beyond, TILE)


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
    OCTAVES: tl.constexpr,
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
    of_row, depth = span_of(tl.reshape(scale, (TILE, BLOCKS)), 1)
    each = tl.reshape(tl.broadcast_to(of_row[:, None], (TILE, BLOCKS)), (TILE * BLOCKS,))
    # float16 holds every E4M3 number, and as many octaves below them as matter.
    factor = (tl.maximum(127 + scale - each, 1) << 23).to(tl.float32, bitcast=True).to(tl.float16)
    # Those that are in units of the row's already stay where they are: a block is a sector of memory, or more.
    moved = inside & (scale != each)[:, None]
    x = tl.load(payload_ptr + at, mask=moved, other=0).to(tl.float8e4nv, bitcast=True).to(tl.float16)
    tl.store(payload_ptr + at, to_e4m3(x * factor[:, None]), mask=moved)
    store_rows(scales_ptr, inexact_ptr, rows, of_row, too_far(of_row, depth, OCTAVES), TILE)


@triton.jit
def in_units(x, GRID: tl.constexpr, dtype: tl.constexpr):
    """A float32 tile whose lines are blocks, rounded onto the grid, if given, in units of powers of two: (lines,).

    Third, each block's `scale_below`. Rounding to a grid that `dtype` holds is done with that.
    """
    if GRID is None:
        unit = tl.full([x.shape[0]], 1.0, tl.float32)
        largest = tl.max(tl.abs(x).to(tl.int32, bitcast=True), axis=1)
    elif GRID.value.held:
        x, unit = round_tile(x, GRID)
        largest = held_bits(tl.max(tl.abs(x), axis=1) * unit, GRID)
    else:
        x = quantize_tile(x, GRID, dtype).to(tl.float32)
        unit = tl.full([x.shape[0]], 1.0, tl.float32)
        largest = tl.max(tl.abs(x).to(tl.int32, bitcast=True), axis=1)
    return x, unit, scale_below(largest)


@triton.jit
def held_bits(largest, GRID: tl.constexpr):
    """The bits of a block's largest entry as the dtype holds it.

    What is too large is at most the dtype's next power of two, and E4M3 rounds the dtype's largest to that too.
    """
    held = tl.minimum(largest, GRID.value.largest, propagate_nan=tl.PropagateNan.ALL)
    return held.to(tl.int32, bitcast=True) & 0x7FFF_FFFF


@triton.jit
def scale_below(largest):
    """Exponent + 127 of the scale under which a magnitude, given by its bits, comes to lie in [128, 256).

    `_BROKEN`, which is larger than all others, for NaN and infinity.
    """
    return tl.where(largest >> 23 == 255, _BROKEN, tl.maximum((largest >> 23) - 7, 1))


@triton.jit
def as_power(scale):
    """The scale that `scale_below` gives, as float32; NaN where it is broken, and with it every sum over the row."""
    return tl.where(scale == _BROKEN, _NAN, scale << 23).to(tl.float32, bitcast=True)


@triton.jit
def power_below(scale):
    """What `scale_below` divides by, inverted, float32."""
    return ((254 - scale) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _ends(most, depth, most2, depth2):
    return tl.maximum(most, most2), tl.maximum(depth, depth2)


@triton.jit
def span_of(scale, axis: tl.constexpr):
    """The largest of blocks' scales, which is their row's, and 255 less the least of blocks that are not zero, or 0."""
    return tl.reduce((scale, tl.where(scale > 1, 255 - scale, 0)), axis, _ends)


@triton.jit
def too_far(of_row, depth, OCTAVES: tl.constexpr):
    """Whether a block lies too far below its row, int32."""
    return ((depth > 0) & (of_row + depth > OCTAVES + 255) & (of_row != _BROKEN)).to(tl.int32)


@triton.jit
def blocks_to_e4m3(x, FORMAT_BLOCK: tl.constexpr, GRID: tl.constexpr, dtype: tl.constexpr):
    """A tile (rows, width), rounded, as E4M3 bytes in units of each block's own power of two, and exponents + 127."""
    rows: tl.constexpr = x.shape[0]
    width: tl.constexpr = x.shape[1]
    x, unit, scale = in_units(tl.reshape(x, (rows * (width // FORMAT_BLOCK), FORMAT_BLOCK)), GRID, dtype)
    payload = to_e4m3(x * (unit * power_below(scale))[:, None])
    return tl.reshape(payload, (rows, width)), tl.reshape(scale, (rows, width // FORMAT_BLOCK))


@triton.jit
def store_rows(scales_ptr, inexact_ptr, rows, scale, beyond, TILE: tl.constexpr):
    """Write the powers of two of `TILE` rows, and count those that are `beyond` E4M3."""
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    tl.store(scales_ptr + row, as_power(scale), mask=row < rows)
    count = tl.sum(beyond, axis=0)
    if count > 0:
        tl.atomic_add(inexact_ptr, count.to(tl.int64))
