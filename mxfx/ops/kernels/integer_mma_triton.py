"""Rows of MX integers times packed MX integers on the tensor cores' int8: exact sums over blocks, float32 over them.

For more rows than `integer_triton` keeps up with, in its layout of operands. A product is a block long, so that its
int32 sum meets the two powers of two of its blocks, exactly; only the sum over blocks rounds, in float32. Weights come
from memory as they are packed, once for up to 32 rows, and are decoded in the registers that tensor cores read.

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
from mxfx.ops.kernels.early_triton import ask_for, starts_early, wait
from mxfx.ops.kernels.integer_triton import TOGETHER, filled, unit_power
from mxfx.ops.kernels.packed_triton import power
from mxfx.ops.kernels.rounding_triton import _PACKS

_HIGH_NIBBLES = tl.constexpr(0xF0)
#: Both nibbles of four bytes as int8, times 16.
_NIBBLES = tl.constexpr("{.reg .b32 low; shl.b32 low, $2, 4; and.b32 $0, low, 0xf0f0f0f0; and.b32 $1, $2, 0xf0f0f0f0;}")
#: 1.5 * 2^23 by its bits, beside which the unit in the last place is 1: sums below 2^22 need no conversion.
_BESIDE = tl.constexpr(0x4B40_0000)
_BESIDE_VALUE = tl.constexpr(1.5 * 2.0**23)
#: Blocks whose scales are a word.
_WORD = 4


@dataclass(frozen=True)
class Tiling:
    """Channels and rows of a program; warps, which share a row's blocks; blocks a turn of each; turns on their way."""

    channels: int
    rows: int
    warps: int
    blocks: int
    stages: int


def tiling_for(rows: int, channels: int, blocks: int) -> Tiling:
    """For so many rows, output channels in all and blocks of a row."""
    each = min(max(triton.next_power_of_2(rows), 8), 32)
    return Tiling(32 if channels >= 4096 else 16, each, 4 if channels >= 4096 else 8, _WORD, 3)


def multiply_integer_tiles(
    x: Tensor,
    units: Tensor,
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    biases: Sequence[Tensor],
    residual: Tensor | None,
    fmt: Format,
    out: Tensor,
    tiling: Tiling | None = None,
) -> None:
    """What `multiply_integers` does, for blocks of 32, 64 or 128; `tiling` instead of that of `tiling_for`."""
    assert out.is_contiguous() and (residual is None or residual.is_contiguous())
    start, per_row = 0, units.shape[1]
    # A word of scales has to lie on its address.
    words = per_row % _WORD == 0 and not any(t.data_ptr() % _WORD for t in (units, *scales))
    for first in range(0, len(codes), TOGETHER):
        some = slice(first, first + TOGETHER)
        sizes = tuple(c.shape[0] for c in codes[some])
        launch = _launch(
            *(x.shape[0], x.shape[1], sizes, out.shape[1], start, out.dtype, x.device),
            *(bool(biases), residual is not None, words, fmt, tiling or tiling_for(x.shape[0], sum(sizes), per_row)),
        )
        powers = scales[some]
        launch(
            *(x, _in_words(units, words), *filled(codes[some]), *filled([_in_words(s, words) for s in powers])),
            *(*filled(biases[some] or powers), out if residual is None else residual, out),
        )
        start += sum(sizes)


def _in_words(scales: Tensor, words: bool) -> Tensor:
    return scales.view(torch.int32) if words else scales


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
    words: bool,
    fmt: Format,
    tiling: Tiling,
) -> Launch:
    assert fmt.block is not None
    tiles = [triton.cdiv(n, tiling.channels) for n in sizes] + [0] * (TOGETHER - len(sizes))
    padded = [*sizes, *[0] * (TOGETHER - len(sizes))]
    groups, per_row = triton.cdiv(rows, tiling.rows), width // fmt.block
    at_a_time = tiling.blocks if words else 1
    return Launch(
        _integer_tiles_kernel,
        lambda _: sum(tiles) * groups,
        (
            *(rows, per_row, triton.cdiv(per_row, tiling.warps * at_a_time), out_width, start),
            *(*padded, tiles[0], tiles[0] + tiles[1], groups),
        ),
        {
            "ROWS": tiling.rows,
            "CHANNELS": tiling.channels,
            "WARPS": tiling.warps,
            "BLOCKS": at_a_time,
            "BLOCK": fmt.block,
            "BIAS": bias,
            "RESIDUAL": residual,
            "STAGES": tiling.stages,
            "EARLY": starts_early(device),
        },
        num_warps=tiling.warps,
        launch_pdl=starts_early(device),
    )


@triton.jit(do_not_specialize=["rows", "turns", "start", "size0", "size1", "size2", "second", "third", "groups"])
def _integer_tiles_kernel(
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
    turns,
    out_width,
    start,
    size0,
    size1,
    size2,
    second,
    third,
    groups,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    WARPS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program, `ROWS` rows and `CHANNELS` results of one weight; neighbours take the other rows of the same.

    Each warp takes `BLOCKS` neighbouring blocks a turn, whose scales are one word where `BLOCKS` is four; all warps'
    sums are added at the end. Tiles from `second` and `third` on are the other weights'.
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
    ask_for(codes_ptr, channel, size, per_row * (BLOCK // 2), EARLY)
    ask_for(scales_ptr, channel, size, per_row, EARLY)
    wait(EARLY)
    real, known = channel < size, row < rows
    words = per_row // BLOCKS
    line = channel.to(tl.int64) * words
    warp = tl.arange(0, WARPS)
    byte = tl.arange(0, BLOCK // 2)[None, None, :]
    lane = tl.arange(0, BLOCK)[None, None, :]
    total = tl.zeros((WARPS, CHANNELS, ROWS), tl.float32)
    beside = tl.full((WARPS, CHANNELS, ROWS), _BESIDE, tl.int32)
    for turn in tl.range(0, turns, num_stages=STAGES):
        word = turn * WARPS + warp
        inside = word < words
        of_weight = inside[:, None] & real[None, :]
        of_x = inside[:, None] & known[None, :]
        there = word[:, None] + line[None, :]
        at = word[:, None] + (row * words)[None, :]
        scale = tl.load(scales_ptr + there, mask=of_weight, other=0).to(tl.int32)
        unit = tl.load(units_ptr + at, mask=of_x, other=0).to(tl.int32)
        for i in tl.static_range(BLOCKS):
            places = (there * BLOCKS + i)[:, :, None] * (BLOCK // 2) + byte
            codes = tl.load(codes_ptr + places, mask=of_weight[:, :, None], other=0)
            places = (at * BLOCKS + i)[:, :, None] * BLOCK + lane
            entries = tl.load(x_ptr + places, mask=of_x[:, :, None], other=0)
            part = tl.dot(nibbles(codes), in_words(entries), beside, out_dtype=tl.int32)
            # Codes came times 16.
            of_channel = power((scale >> (8 * i)) & 0xFF) * 0.0625
            value = (part.to(tl.float32, bitcast=True) - _BESIDE_VALUE) * of_channel[:, :, None]
            total += value * unit_power((unit >> (8 * i)) & 0xFF)[:, None, :]
    y = tl.sum(total, axis=0)
    if BIAS:
        bias_ptr = tl.where(is_third, bias2_ptr, tl.where(is_second, bias1_ptr, bias0_ptr))
        y += tl.load(bias_ptr + channel, mask=real, other=0.0).to(tl.float32)[:, None]
    at = row.to(tl.int64)[None, :] * out_width + start + channel[:, None]
    mask = known[None, :] & real[:, None]
    y = y.to(y_ptr.dtype.element_ty)
    if RESIDUAL:
        y = (tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32) + y.to(tl.float32)).to(y.dtype)
    tl.store(y_ptr + at, y, mask=mask)


@triton.jit
def nibbles(codes):
    """Bytes of codes (warps, channels, n) as int8 times 16, (warps, channels, 2 n): of each four the even ones first.

    So a thread, which has eight neighbours of what tensor cores multiply, has four neighbouring bytes.
    """
    if _PACKS:
        even, odd = tl.inline_asm_elementwise(
            _NIBBLES, "=r,=r,r", [codes], dtype=(tl.int8, tl.int8), is_pure=True, pack=4
        )
    else:
        even, odd = (codes << 4).to(tl.int8), (codes & _HIGH_NIBBLES).to(tl.int8)
    pairs = tl.reshape(tl.join(even, odd), (codes.shape[0], codes.shape[1], codes.shape[2] // 4, 4, 2))
    return tl.reshape(tl.permute(pairs, (0, 1, 2, 4, 3)), (codes.shape[0], codes.shape[1], 2 * codes.shape[2]))


@triton.jit
def in_words(entries):
    """A block's int8 (warps, rows, n), its even places first, in the order of `nibbles`; (warps, n, rows)."""
    n: tl.constexpr = entries.shape[2]
    halves = tl.reshape(entries, (entries.shape[0], entries.shape[1], 2, n // 8, 4))
    ordered = tl.reshape(tl.permute(halves, (0, 1, 3, 2, 4)), (entries.shape[0], entries.shape[1], n))
    return tl.permute(ordered, (0, 2, 1))
