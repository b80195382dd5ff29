"""Few rows of MX integers times packed MX integers: four products of codes at an instruction, summed exactly in int32.

Both operands stay codes. The sum over a block is an integer; it meets the two powers of two of its blocks, which is
exact, and only the sum over blocks rounds, in float32. Weights that read one input are one launch.

An operand's rows are int8 (rows, width): in each block those of even places first, so that a word of them meets the low
nibbles of a word of packed codes, or its high ones. A block's unit is a power of two, uint8 exponent + 127 (rows,
width / block); 255 says that the block is no number, and its codes are zero.

Importable only where `triton` is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxfx.algorithms.launch import KEPT_SHAPES, Launch
from mxfx.formats import Format
from mxfx.ops.kernels.early_triton import ask_for, starts_early, wait
from mxfx.ops.kernels.packed_triton import power
from mxfx.ops.kernels.rounding_triton import _PACKS

#: Codes, units, and a counter, int64 (1,), of rows of which int8 does not hold every entry.
Integers = tuple[Tensor, Tensor, Tensor]
#: Weights of one launch, and of how many bytes they may be to be asked for before the launch's turn: more, asked for
#: all at once, come later than they would. Of an H200, where o of an 8B shape (8 MB) loses a tenth, of a 1B shape
#: (2 MB) gains a quarter.
TOGETHER = 3
EARLY_BYTES = 1 << 22
_HIGH_NIBBLES = tl.constexpr(0xF0F0F0F0 - 2**32)
_BROKEN = tl.constexpr(255)


@dataclass(frozen=True)
class Tiling:
    """Output channels of a program, its rows, input blocks that it takes at a time, warps."""

    channels: int
    rows: int
    blocks: int
    warps: int


def tiling_for(rows: int, channels: int, blocks: int) -> Tiling:
    """For so many rows, output channels in all and blocks of a row.

    Of one row the best of 24 for each of four linears, on an H200; `tools/bench/packed_gemm.py --part tilings`.
    """
    most = min(triton.next_power_of_2(blocks), 128)
    if rows == 1 and most <= 64:
        return Tiling(4, 1, most, 1) if channels < 8192 else Tiling(4, 1, most, 2 if most == 64 else 1)
    together = min(triton.next_power_of_2(rows), 4)
    return Tiling(4 if channels >= 4096 and together < 4 else 2, together, most, 2 if most <= 64 else 4)


def multiply_integers(
    x: Tensor,
    units: Tensor,
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    biases: Sequence[Tensor],
    residual: Tensor | None,
    fmt: Format,
    out: Tensor,
) -> None:
    """Write linears of one input side by side to `out` (m, Σ n), contiguous, and add `residual` (m, Σ n), if given.

    x and units as above, `codes`, `scales` as in `mxfx::mx_linear`, `biases` as many or none; `fmt` is of 4-bit
    integers in blocks that are multiples of 8. The residual meets results that are rounded to `out`'s dtype.
    """

    def launch(sizes: tuple[int, ...], start: int) -> Launch:
        return _launch(
            *(x.shape[0], x.shape[1], sizes, out.shape[1], start, out.dtype, x.device),
            *(bool(biases), residual is not None, fmt, tiling_for(x.shape[0], sum(sizes), units.shape[1])),
        )

    words = [c.view(torch.int32) for c in codes]
    side_by_side(launch, x.view(torch.int32), units, words, scales, biases, residual, out)


def side_by_side(
    launch: Callable[[tuple[int, ...], int], Launch],
    x: Tensor,
    units: Tensor,
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    biases: Sequence[Tensor],
    residual: Tensor | None,
    out: Tensor,
) -> None:
    """As many weights at a launch as fit; ``launch`` is asked with their channels and where they begin in `out`."""
    assert out.is_contiguous() and (residual is None or residual.is_contiguous())
    start = 0
    for first in range(0, len(codes), TOGETHER):
        some = slice(first, first + TOGETHER)
        sizes, powers = tuple(c.shape[0] for c in codes[some]), scales[some]
        launch(sizes, start)(
            *(x, units, *filled(codes[some]), *filled(powers), *filled(biases[some] or powers)),
            *(out if residual is None else residual, out),
        )
        start += sum(sizes)


def laid_out(sizes: Sequence[int], channels: int) -> tuple[int, tuple[int, ...]]:
    """Tiles of ``channels`` that weights of those sizes take; and for a kernel their sizes, and where the second's and
    the third's tiles begin.
    """
    padded = [*sizes, *[0] * (TOGETHER - len(sizes))]
    tiles = [triton.cdiv(n, channels) for n in padded]
    return sum(tiles), (*padded, tiles[0], tiles[0] + tiles[1])


def filled(tensors: Sequence[Tensor]) -> list[Tensor]:
    """As many as a launch takes."""
    return [*tensors, *[tensors[0]] * (TOGETHER - len(tensors))]


@lru_cache(maxsize=KEPT_SHAPES)
def _launch(
    rows: int,
    width: int,
    sizes: tuple[int, ...],
    out_width: int,
    start: int,
    dtype: torch.dtype,
    device: torch.device,
    bias: bool,
    residual: bool,
    fmt: Format,
    tiling: Tiling,
) -> Launch:
    assert fmt.block is not None
    tiles, places = laid_out(sizes, tiling.channels)
    groups = triton.cdiv(rows, tiling.rows)
    early = starts_early(device, rows) and sum(sizes) * width // 2 <= EARLY_BYTES
    return Launch(
        _integers_kernel,
        lambda at_a_time: tiles * groups,
        (rows, width // fmt.block, out_width, start, *places, groups, 1),
        {
            "ROWS": tiling.rows,
            "CHANNELS": tiling.channels,
            "BLOCKS": tiling.blocks,
            "QUADS": fmt.block // 8,
            "BIAS": bias,
            "RESIDUAL": residual,
            "EARLY": early,
        },
        num_warps=tiling.warps,
        launch_pdl=early,
    )


@triton.jit
def dot4(a, b, total):
    """`total` and the four products of int8 in each word of `a` with those of `b`; int32."""
    if _PACKS:
        total = tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, total], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        for i in tl.static_range(4):
            total += ((a << (24 - 8 * i)) >> 24) * ((b << (24 - 8 * i)) >> 24)
    return total


@triton.jit(do_not_specialize=["start", "one"])
def _integers_kernel(
    x_ptr,
    units_ptr,
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
    per_row,
    out_width,
    start,
    size0,
    size1,
    size2,
    second,
    third,
    groups,
    one,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCKS: tl.constexpr,
    QUADS: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program, `ROWS` rows and `CHANNELS` results of one weight; neighbours take the other rows of the same.

    A thread takes whole blocks: `QUADS` words of 8 codes. Tiles from `second` and `third` on are the other weights'.
    `one` is 1, which the compiler must not know: it would load neighbouring scales at once, into other threads.
    """
    tile = tl.program_id(0) // groups
    row = tl.program_id(0) % groups * ROWS + tl.arange(0, ROWS)
    is_third, is_second = tile >= third, tile >= second
    codes_ptr = tl.where(is_third, codes2_ptr, tl.where(is_second, codes1_ptr, codes0_ptr))
    scales_ptr = tl.where(is_third, scales2_ptr, tl.where(is_second, scales1_ptr, scales0_ptr))
    size = tl.where(is_third, size2, tl.where(is_second, size1, size0))
    first = tl.where(is_third, third, tl.where(is_second, second, 0))
    start += tl.where(is_third, size0 + size1, tl.where(is_second, size0, 0))
    channel = (tile - first) * CHANNELS + tl.arange(0, CHANNELS)
    ask_for(codes_ptr, channel, size, per_row * (QUADS * 4), EARLY)
    ask_for(scales_ptr, channel, size, per_row, EARLY)
    wait(EARLY)
    real, known = channel < size, row < rows
    line = channel.to(tl.int64) * per_row
    quad = tl.arange(0, QUADS)[None, None, None, :]
    total = tl.zeros((BLOCKS, ROWS, CHANNELS), tl.float32)
    for turn in range(0, per_row, BLOCKS):
        block = turn + tl.arange(0, BLOCKS)
        inside = block < per_row
        of_weight = inside[:, None] & real[None, :]
        there = block[:, None] + line[None, :]
        codes = tl.load(codes_ptr + there[:, None, :, None] * QUADS + quad, mask=of_weight[:, None, :, None], other=0)
        scale = tl.load(scales_ptr + (block * one)[:, None] + line[None, :], mask=of_weight, other=0).to(tl.int32)
        of_x = inside[:, None] & known[None, :]
        at = block[:, None] + (row * per_row)[None, :]
        words = x_ptr + at[:, :, None, None] * (2 * QUADS) + quad
        even = tl.load(words, mask=of_x[:, :, None, None], other=0)
        odd = tl.load(words + QUADS, mask=of_x[:, :, None, None], other=0)
        unit = tl.load(units_ptr + (block * one)[:, None] + (row * per_row)[None, :], mask=of_x, other=0).to(tl.int32)
        part = dot4((codes << 4) & _HIGH_NIBBLES, even, tl.zeros((BLOCKS, ROWS, CHANNELS, QUADS), tl.int32))
        part = tl.sum(dot4(codes & _HIGH_NIBBLES, odd, part), axis=3)
        # Codes came times 16.
        value = part.to(tl.float32) * (power(scale) * 0.0625)[:, None, :]
        total += value * unit_power(unit)[:, :, None]
    y = tl.sum(total, axis=0)
    if BIAS:
        bias_ptr = tl.where(is_third, bias2_ptr, tl.where(is_second, bias1_ptr, bias0_ptr))
        y += tl.load(bias_ptr + channel, mask=real, other=0.0).to(tl.float32)[None, :]
    at = row.to(tl.int64)[:, None] * out_width + start + channel[None, :]
    mask = known[:, None] & real[None, :]
    y = y.to(y_ptr.dtype.element_ty)
    if RESIDUAL:
        y = (tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32) + y.to(tl.float32)).to(y.dtype)
    tl.store(y_ptr + at, y, mask=mask)


@triton.jit
def unit_power(unit):
    """A block's power of two from its byte, float32; infinity for a block that is no number, whose codes are zero."""
    return (unit << 23).to(tl.float32, bitcast=True)


@triton.jit
def blocks_to_integers(x, FORMAT_BLOCK: tl.constexpr):
    """A tile (rows, width) on a grid of a few bits as int8 in units of each block's own, and the units' bytes.

    Third, for each block whether int8 does not hold an entry (int32): its largest comes to lie in [64, 128).
    """
    rows: tl.constexpr = x.shape[0]
    width: tl.constexpr = x.shape[1]
    x = tl.reshape(x, (rows * (width // FORMAT_BLOCK), FORMAT_BLOCK))
    exponent = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFF_FFFF, axis=1) >> 23
    unit = tl.where(exponent == 255, _BROKEN, tl.maximum(exponent - 6, 1))
    scaled = tl.where((exponent == 255)[:, None], 0.0, x * ((254 - unit) << 23).to(tl.float32, bitcast=True)[:, None])
    code = scaled.to(tl.int32)
    lost = tl.max((code.to(tl.float32) != scaled).to(tl.int32), axis=1)
    shape: tl.constexpr = (rows, width // FORMAT_BLOCK)
    return tl.reshape(code, (rows, width)).to(tl.int8), tl.reshape(unit, shape), tl.reshape(lost, shape)


@triton.jit
def place(lane, FORMAT_BLOCK: tl.constexpr):
    """Where entry `lane` of a row goes: in its block, even places first."""
    within = lane % FORMAT_BLOCK
    return lane - within + (within % 2) * (FORMAT_BLOCK // 2) + within // 2


@triton.jit
def count_lost(inexact_ptr, lost):
    """Count a tile's rows that lost something, `lost` (rows, blocks)."""
    count = tl.sum(tl.max(lost, axis=1), axis=0)
    if count > 0:
        tl.atomic_add(inexact_ptr, count.to(tl.int64))
