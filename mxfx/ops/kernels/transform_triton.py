"""Block transform with what comes before it (SiLU·up, RoPE, RMSNorm) and `fake_quantize` behind it, in one pass.

A tile is (rows, width): rows of one column, which is one block, or several where nothing is multiplied; side by side
under a block-diagonal matrix, NaN or infinity in one would reach the others, so several blocks with matrices of their
own lie one below the other in a tile and are a batch of products. The product is taken on the tensor
cores with float32 accumulation and is exact or nearly: a Hadamard matrix is used by its signs and scaled after; a
matrix of x's own 16-bit dtype is used as it is; to a wider one bfloat16 `x` is multiplied as to a sum of two bfloat16
terms (relative error 2^-17 of each entry, far under the 2^-9 of the result); all else takes three tf32 terms.

Importable only where `triton` is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxfx.algorithms.launch import KEPT_SHAPES, Launch
from mxfx.formats import Format
from mxfx.ops.kernels.activation_triton import load_sum, rotate, row_factors, silu_times
from mxfx.ops.kernels.addressing import Rows, alike, as_rows, is_walkable
from mxfx.ops.kernels.early_triton import starts_early, wait
from mxfx.ops.kernels.fp8_triton import blocks_to_e4m3
from mxfx.ops.kernels.integer_triton import Integers, blocks_to_integers, count_lost, place
from mxfx.ops.kernels.matrix_triton import load_matrix, multiply, quantize_blocks, terms_of
from mxfx.ops.kernels.quantize_triton import row_index
from mxfx.ops.kernels.rounding_triton import as_stored, grid_of


@dataclass(frozen=True)
class Tiling:
    """How a tile is cut: its elements, how many a thread has, how many are on their way, registers of a thread.

    `blocks` with matrices of their own share a tile where so many are side by side: a line of memory is then read at
    once. One block of 64 rows and four warps uses the asynchronous tensor cores of Hopper, all else the ordinary ones.
    """

    elements: int
    per_thread: int
    stages: int
    registers: int | None = None
    min_rows: int = 64
    blocks: int = 1


#: By what a block is multiplied by (nothing, signs, a matrix in one term, in two) and its width, 128 and above as 128.
#: Two wide programs fit a multiprocessor only if each is frugal with registers.
TILINGS = {
    ("none", 32): Tiling(4096, 32, 2),
    ("none", 64): Tiling(4096, 32, 2),
    ("none", 128): Tiling(8192, 32, 2),
    ("signs", 32): Tiling(4096, 32, 1, registers=80),
    ("signs", 64): Tiling(4096, 32, 2),
    ("signs", 128): Tiling(8192, 64, 3, registers=144),
    ("one term", 32): Tiling(2048, 16, 1, min_rows=16, blocks=4),
    ("one term", 64): Tiling(4096, 32, 2, registers=72),
    ("one term", 128): Tiling(8192, 64, 3, registers=144),
    ("two terms", 32): Tiling(2048, 32, 1, min_rows=16),
    ("two terms", 64): Tiling(4096, 32, 1),
    ("two terms", 128): Tiling(8192, 64, 1, registers=255),
}
#: Rows of a tile where there are few: as many as a product takes.
FEW = 16
#: Blocks that nothing multiplies share a tile up to this width: as many bytes as a line of memory.
GROUP_WIDTH = 64


def transform_triton(
    x: Tensor,
    matrix: Tensor | None,
    signs: bool = False,
    fmt: Format | None = None,
    *,
    gate: Tensor | None = None,
    angles: tuple[Tensor, Tensor] | None = None,
    norm: tuple[Tensor | float, Tensor | None, float] | None = None,
    e4m3: tuple[Tensor, Tensor] | None = None,
    integers: Integers | None = None,
    heads_together: bool = False,
    added: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`x_B @ matrix` per block, then `fmt`; contiguous, same shape and dtype as `x`.

    Args:
        x: (..., n); bfloat16, float16 or float32. At most one of the last three says what happens to it first.
        matrix: (b, b) for all blocks; (n / b, b, b); (heads, n / b, b, b) for x (batch, heads * group, seq, n). None
            transforms nothing and takes blocks from `fmt`, or else the whole row.
        signs: every entry of `matrix` is ±1/√b; only the signs are read.
        fmt: rounds the result (after it is rounded to x's dtype); its block divides b. None leaves it.
        gate: like `x`; x becomes `silu(gate) * x`.
        angles: cos and sin, (batch | 1, seq, n); x (batch, heads, seq, n) becomes `rope(x, cos, sin)`.
        norm: float32 factors of the rows, `x.shape[:-1]`, or the `eps` of few rows, of which each program finds them;
            factors of the channels, (n,) or None for 1; what to add to the latter. They meet the product in float32,
            without the roundings of `rms_norm`. Only with (n / b, b, b).
        e4m3: where to put the rounded result instead, as `align_rows` takes it: E4M3 bytes like `x`, and an exponent a
            block. Blocks are powers of two from 16, and x has three axes at most.
        integers: the same, as `integer_triton` takes it; of few rows.
        heads_together: with `angles`, the result is contiguous as (batch, seq, heads, n), and given transposed.
        added: with an `eps` in `norm`, what is added to x first, and where to put the sum, contiguous; both like x.
    """
    written = e4m3 or integers
    if heads_together:
        out = x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)
    else:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if written is None else written[0]
    if out.numel() == 0:
        return out
    before, first, second, one_angle, offset, eps = "none", x, x, False, 0.0, None
    if gate is not None:
        before = "silu"
        if gate.stride() != x.stride():
            x, gate = x.contiguous(), gate.contiguous()
    in_axes = angles is not None or (matrix is not None and matrix.dim() == 4)
    if x.stride(-1) != 1 if in_axes else not is_walkable(x):
        x = x.contiguous()
        gate = None if gate is None else gate.contiguous()
    total = x
    if gate is not None:
        first = gate
    elif angles is not None:
        before, one_angle = "rope", angles[0].shape[0] == 1
        first, second = (t.to(x.dtype).contiguous() for t in angles)
    elif norm is not None:
        factors, gain, offset = norm
        first, eps = (factors, None) if isinstance(factors, Tensor) else (x, factors)
        if added is not None:
            x, first, total = *alike(x, added[0]), added[1]
        before = "scale" if gain is None else "norm"
        second = x if gain is None else gain.contiguous()
    kind, terms = None, 0
    if matrix is not None:
        matrix, kind = matrix.contiguous(), matrix.shape
        terms = 2 if before == "norm" else terms_of(matrix.dtype, x.dtype, signs)
    launch = _launch(
        x.shape, x.stride(), x.dtype, x.device, kind, terms, signs, fmt, before, one_angle, offset, eps,
        integers is not None, heads_together, added is not None,
    )  # fmt: skip
    rest = (out, out) if written is None else (written[1], written[1] if integers is None else integers[2])
    launch(x, first, second, x if matrix is None else matrix, out, *rest, total)
    return out


@lru_cache(maxsize=KEPT_SHAPES)
def _launch(
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    matrix: tuple[int, ...] | None,
    terms: int,
    signs: bool,
    fmt: Format | None,
    before: str,
    one_angle: bool,
    offset: float,
    eps: float | None,
    few: bool,
    heads_together: bool = False,
    added: bool = False,
) -> Launch:
    length, own = shape[-1], matrix is not None and len(matrix) > 2
    block = matrix[-1] if matrix is not None else fmt.block if fmt and fmt.block else length
    heads, head_stride, angle_stride = 1, 0, 0
    in_axes = before == "rope" or (matrix is not None and len(matrix) == 4)
    if in_axes:
        heads = matrix[0] if matrix is not None and len(matrix) == 4 else 1
        group = shape[1] // heads
        rows = Rows(length, shape[0] * group * shape[2], (shape[0], group, shape[2]), (stride[0], stride[1], stride[2]))
        head_stride, angle_stride = group * stride[1], 0 if one_angle else shape[2] * length
    else:
        rows = as_rows(shape, stride)
    parts = length // block
    side_by_side = _side_by_side(parts, block) if matrix is None and before == "rope" else 1
    parts //= side_by_side
    if not own and not in_axes and rows.flat:
        rows, parts = Rows(block, rows.count * parts, (1, 1, rows.count * parts), (0, 0, block)), 1
    # Heads and angles are told by the index along each axis.
    steps = (*rows.sizes[1:], *rows.strides) if in_axes else rows.arguments
    width = block * side_by_side
    padded = triton.next_power_of_2(width)
    if matrix is not None:
        padded = max(padded, 16)
    factor = "none" if matrix is None else "signs" if signs else "one term" if terms == 1 else "two terms"
    tiling = TILINGS[factor, min(max(padded, 32), 128)]
    # A gain differs from block to block, and RoPE's loads are slower with more of them in a tile.
    blocks = tiling.blocks if own and before not in ("norm", "rope") else 1
    while parts % blocks:
        blocks //= 2
    parts //= blocks
    tile = max(tiling.elements // (padded * tiling.blocks), tiling.min_rows if matrix is not None else 1)
    if few:
        tile = FEW
    tiles, columns = triton.cdiv(rows.count, tile), heads * parts
    early = starts_early(device, math.prod(shape[:-1]))
    return Launch(
        _transform_kernel,
        # Each keeps one matrix and takes many tiles.
        lambda at_a_time: columns * min(max(at_a_time // columns, 1), tiles),
        (rows.count, columns, head_stride, angle_stride, *steps, tiles),
        {
            "SCALE": block**-0.5,
            "GAIN_OFFSET": offset,
            "HEADS": heads,
            "TOGETHER": heads_together,
            "TILE": tile,
            "FLAT": rows.flat and not in_axes and tile * rows.length < 2**31,
            "EVEN": rows.count % tile == 0,
            "BLOCKS": blocks,
            "WIDTH": width,
            "PADDED": padded,
            "ROW": length if before == "rope" else 0,
            "FORMAT_BLOCK": padded if fmt is None or fmt.block == width else fmt.block,
            "BEFORE": before,
            "SQUARES": 0 if eps is None else triton.next_power_of_2(rows.count),
            "EPS": eps,
            "ADDED": added,
            "OWN": own,
            "TERMS": terms,
            "SIGNS": signs,
            # More operands on their way need more shared memory.
            "STAGES": min(tiling.stages, 2) if before in ("silu", "rope") else tiling.stages,
            "GRID": fmt and grid_of(fmt, dtype),
            "EARLY": early,
        },
        launch_pdl=early,
        num_warps=max(1, blocks * tile * padded // (32 * tiling.per_thread)),
        maxnreg=tiling.registers,
        # A product that meets its sum in one FMA would skip a rounding that the ops of RoPE make.
        enable_fp_fusion=before != "rope",
    )


def _side_by_side(blocks: int, block: int) -> int:
    """How many of a row's blocks share a tile where nothing multiplies them."""
    count = 1
    while block & (block - 1) == 0 and blocks % (2 * count) == 0 and 2 * count * block <= GROUP_WIDTH:
        count *= 2
    return count


@triton.jit(do_not_specialize=["rows", "tiles"])
def _transform_kernel(
    x_ptr,
    first_ptr,
    second_ptr,
    matrix_ptr,
    y_ptr,
    blocks_ptr,
    inexact_ptr,
    total_ptr,
    rows,
    columns,
    head_stride,
    angle_stride,
    size1,
    size2,
    stride0,
    stride1,
    stride2,
    tiles,
    SCALE: tl.constexpr,
    GAIN_OFFSET: tl.constexpr,
    HEADS: tl.constexpr,
    TOGETHER: tl.constexpr,
    TILE: tl.constexpr,
    FLAT: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    ROW: tl.constexpr,
    FORMAT_BLOCK: tl.constexpr,
    BEFORE: tl.constexpr,
    SQUARES: tl.constexpr,
    EPS: tl.constexpr,
    ADDED: tl.constexpr,
    OWN: tl.constexpr,
    TERMS: tl.constexpr,
    SIGNS: tl.constexpr,
    STAGES: tl.constexpr,
    GRID: tl.constexpr,
    EARLY: tl.constexpr,
):
    """A program keeps the matrix of one column and walks down that column's tiles.

    A column is a part of the row, `WIDTH` wide; with `HEADS`, of the rows of one head; with `BLOCKS`, so many parts,
    each below the one before it in the tile.
    """
    wait(EARLY)
    narrow = x_ptr.dtype.element_ty
    column = tl.program_id(0) % columns
    parts = columns // HEADS
    head = column // parts
    channel = (column % parts) * (WIDTH * BLOCKS)
    length = parts * (BLOCKS * WIDTH)  # of a row, or a head's
    lane = tl.arange(0, PADDED)
    line = tl.arange(0, BLOCKS * TILE)
    if BLOCKS > 1:
        channel += (line // TILE) * WIDTH
        line = line % TILE
    if TERMS > 0:
        gain = None
        if BEFORE == "norm":
            gain = tl.load(second_ptr + channel + lane, mask=lane < WIDTH, other=0.0).to(tl.float32) + GAIN_OFFSET
        start_of_matrix = matrix_ptr + (column.to(tl.int64) * (BLOCKS * WIDTH * WIDTH) if OWN else 0)
        if BLOCKS > 1:
            start_of_matrix += (tl.arange(0, BLOCKS) * (WIDTH * WIDTH))[:, None, None]
        high, low = load_matrix(start_of_matrix, gain, WIDTH, PADDED, SIGNS, TERMS, narrow)
    first = tl.program_id(0) // columns
    step = tl.num_programs(0) // columns
    tile_size = tl.full([], TILE, tl.int64) * stride0
    for tile in tl.range(first, tiles, step, num_stages=STAGES):
        row = tile * TILE + line
        x_tile, first_tile, y_tile, blocks_tile = x_ptr, first_ptr, y_ptr, blocks_ptr
        index0, index1, index2 = row_index(row, size1, size2)
        if FLAT:
            # One address a tile; the offsets in it are the same in every turn.
            start = line * stride0
            target = start
            x_tile += tile * tile_size
            first_tile += tile * tile_size
            y_tile += tile * tile_size
            blocks_tile += tile * (tile_size // FORMAT_BLOCK)
        else:
            start = index0.to(tl.int64) * stride0 + index1.to(tl.int64) * stride1 + index2.to(tl.int64) * stride2
            start += head.to(tl.int64) * head_stride
            target = row
            if TOGETHER:
                target = ((index0 * size2 + index2) * HEADS + head) * size1 + index1
            elif HEADS > 1:
                target = ((index0 * HEADS + head) * size1 + index1) * size2 + index2
            target = target.to(tl.int64) * length
        inside = (row < rows)[:, None] | EVEN
        if PADDED != WIDTH:
            inside = inside & (lane < WIDTH)[None, :]
        x = load_sum(x_tile, first_tile, (start + channel)[:, None] + lane[None, :], inside, ADDED)
        if ADDED:
            tl.store(total_ptr + (row.to(tl.int64) * length + channel)[:, None] + lane[None, :], x, mask=inside)
        if BEFORE == "silu":
            gate = tl.load(first_tile + (start + channel)[:, None] + lane[None, :], mask=inside, other=0.0)
            x = silu_times(gate, x)
        if BEFORE == "rope":
            HALF: tl.constexpr = ROW // 2
            at = (channel[:, None] if BLOCKS > 1 else channel) + lane[None, :]
            partner = tl.where(at < HALF, at + HALF, at - HALF)
            turned = tl.load(x_ptr + start[:, None] + partner, mask=inside, other=0.0)
            angle = (index0.to(tl.int64) * angle_stride + index2.to(tl.int64) * ROW)[:, None] + at
            cos = tl.load(first_ptr + angle, mask=inside, other=0.0)
            sin = tl.load(second_ptr + angle, mask=inside, other=0.0)
            x = rotate(x, turned, cos, sin, at < HALF)
        if TERMS > 0:
            x = x.to(narrow)
            if BLOCKS > 1:
                x = tl.reshape(x, (BLOCKS, TILE, PADDED))
            x = multiply(x, high, low, SCALE, SIGNS, TERMS)
            if BLOCKS > 1:
                x = tl.reshape(x, (BLOCKS * TILE, PADDED))
        if BEFORE == "scale" or BEFORE == "norm":
            if SQUARES > 0:
                x *= row_factors(
                    x_ptr, first_ptr, row, rows, length, size1, size2, stride0, stride1, stride2, SQUARES, EPS, ADDED
                )[:, None]
            else:
                x *= tl.load(first_ptr + row, mask=row < rows, other=0.0)[:, None]
        y = as_stored(x.to(tl.float32), narrow)
        if GRID is not None and y_ptr.dtype.element_ty != tl.uint8:
            y = quantize_blocks(y, FORMAT_BLOCK, GRID, narrow)
        if y_ptr.dtype.element_ty == tl.uint8:
            y, scale = blocks_to_e4m3(y, FORMAT_BLOCK, GRID, narrow)
            part = tl.arange(0, PADDED // FORMAT_BLOCK)
            here = (row < rows)[:, None] & (part < PADDED // FORMAT_BLOCK)[None, :]
            block = ((target + channel) // FORMAT_BLOCK)[:, None] + part[None, :]
            tl.store(blocks_tile + block, scale.to(tl.uint8), mask=here)
            tl.store(y_tile + (target + channel)[:, None] + lane[None, :], y, mask=inside)
        elif y_ptr.dtype.element_ty == tl.int8:
            y, unit, lost = blocks_to_integers(tl.where(inside, y.to(tl.float32), 0.0), FORMAT_BLOCK)
            part = tl.arange(0, PADDED // FORMAT_BLOCK)
            block = ((target + channel) // FORMAT_BLOCK)[:, None] + part[None, :]
            tl.store(
                blocks_tile + block,
                unit.to(tl.uint8),
                mask=(row < rows)[:, None] & (part * FORMAT_BLOCK < WIDTH)[None, :],
            )
            tl.store(y_tile + (target + channel)[:, None] + place(lane, FORMAT_BLOCK)[None, :], y, mask=inside)
            count_lost(inexact_ptr, lost)
        else:
            tl.store(y_tile + (target + channel)[:, None] + lane[None, :], y.to(narrow), mask=inside)
