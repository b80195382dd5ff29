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
from mxfx.ops.kernels.early_triton import starts_early, wait
from mxfx.ops.kernels.integer_triton import laid_out, side_by_side, unit_power
from mxfx.ops.kernels.packed_triton import power
from mxfx.ops.kernels.rounding_triton import _PACKS

_HIGH_NIBBLES = tl.constexpr(0xF0)
#: Both nibbles of four bytes as int8, times 16.
_NIBBLES = tl.constexpr("{.reg .b32 low; shl.b32 low, $2, 4; and.b32 $0, low, 0xf0f0f0f0; and.b32 $1, $2, 0xf0f0f0f0;}")
#: 1.5 * 2^23 by its bits, beside which the unit in the last place is 1: sums below 2^22 need no conversion.
_BESIDE = tl.constexpr(0x4B40_0000)
_BESIDE_VALUE = tl.constexpr(1.5 * 2.0**23)


#: Scales of a word.
_WORD = 4


@dataclass(frozen=True)
class Tiling:
    """Channels and rows of a program; warps, which share a row's blocks; blocks a turn of each; turns on their way."""

    channels: int
    rows: int
    warps: int
    blocks: int
    stages: int


def tiling_for(rows: int, channels: int) -> Tiling:
    """For so many rows and output channels in all."""
    each = min(max(triton.next_power_of_2(rows), 8), 32)
    return Tiling(32 if channels >= 4096 else 16, each, 4 if channels >= 4096 else 8, 4, 3)


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
    # A word of scales, which is fetched ahead, has to lie on its address.
    words = units.shape[1] % _WORD == 0 and not any(t.data_ptr() % _WORD for t in (units, *scales))
    if words:
        units, scales = units.view(torch.int32), [s.view(torch.int32) for s in scales]

    def launch(sizes: tuple[int, ...], start: int) -> Launch:
        return _launch(
            *(x.shape[0], x.shape[1], sizes, out.shape[1], start, out.dtype, x.device),
            *(bool(biases), residual is not None, fmt, tiling or tiling_for(x.shape[0], sum(sizes))),
        )

    side_by_side(launch, x, units, codes, scales, biases, residual, out)


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
    groups, per_row = triton.cdiv(rows, tiling.rows), width // fmt.block
    early = starts_early(device, rows)
    return Launch(
        _integer_tiles_kernel,
        lambda _: tiles * groups,
        (
            *(rows, per_row, triton.cdiv(per_row, tiling.warps * tiling.blocks), out_width, start),
            *(*places, groups),
        ),
        {
            "ROWS": tiling.rows,
            "CHANNELS": tiling.channels,
            "BLOCKS": tiling.warps * tiling.blocks,
            "BLOCK": fmt.block,
            "BIAS": bias,
            "RESIDUAL": residual,
            "STAGES": tiling.stages,
            "EARLY": early,
        },
        num_warps=tiling.warps,
        launch_pdl=early,
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
    wait(EARLY)
    tile = tl.program_id(0) // groups
    row = tl.program_id(0) % groups * ROWS + tl.arange(0, ROWS)
    is_third, is_second = tile >= third, tile >= second
    codes_ptr = tl.where(is_third, codes2_ptr, tl.where(is_second, codes1_ptr, codes0_ptr))
    scales_ptr = tl.where(is_third, scales2_ptr, tl.where(is_second, scales1_ptr, scales0_ptr))
    size = tl.where(is_third, size2, tl.where(is_second, size1, size0))
    first = tl.where(is_third, third, tl.where(is_second, second, 0))
    start += tl.where(is_third, size0 + size1, tl.where(is_second, size0, 0))
    channel = (tile - first) * CHANNELS + tl.arange(0, CHANNELS)
    real, known = channel < size, row < rows
    EACH: tl.constexpr = 4 if units_ptr.dtype.element_ty == tl.int32 else 1
    block = tl.arange(0, BLOCKS)
    shift = (8 * (block % EACH))[None, :]
    byte = tl.arange(0, BLOCKS * BLOCK // 2)
    lane = tl.arange(0, BLOCKS * BLOCK)
    of_weight, of_x = channel.to(tl.int64)[:, None] * per_row, row[:, None] * per_row
    total = tl.zeros((BLOCKS, CHANNELS, ROWS), tl.float32)
    beside = tl.full((BLOCKS, CHANNELS, ROWS), _BESIDE, tl.int32)
    for turn in tl.range(0, turns, num_stages=STAGES):
        at = turn * BLOCKS
        inside = (at + block < per_row)[None, :]
        places = (at + block)[None, :] // EACH
        scale = tl.load(scales_ptr + of_weight // EACH + places, mask=inside & real[:, None], other=0).to(tl.int32)
        unit = tl.load(units_ptr + of_x // EACH + places, mask=inside & known[:, None], other=0).to(tl.int32)
        inside = (at * (BLOCK // 2) + byte < per_row * (BLOCK // 2))[None, :] & real[:, None]
        places = of_weight * (BLOCK // 2) + (at * (BLOCK // 2) + byte)[None, :]
        codes = tl.load(codes_ptr + places, mask=inside, other=0)
        inside = (at * BLOCK + lane < per_row * BLOCK)[None, :] & known[:, None]
        entries = tl.load(x_ptr + of_x * BLOCK + (at * BLOCK + lane)[None, :], mask=inside, other=0)
        part = tl.dot(nibbles(by_block(codes, BLOCKS)), in_words(by_block(entries, BLOCKS)), beside, out_dtype=tl.int32)
        # Codes came times 16.
        of_channel = tl.permute(power((scale >> shift) & 0xFF) * 0.0625, (1, 0))[:, :, None]
        of_row = tl.permute(unit_power((unit >> shift) & 0xFF), (1, 0))[:, None, :]
        total += (part.to(tl.float32, bitcast=True) - _BESIDE_VALUE) * of_channel * of_row
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
def by_block(tile, BLOCKS: tl.constexpr):
    """Rows of blocks as blocks of rows."""
    return tl.permute(tl.reshape(tile, (tile.shape[0], BLOCKS, tile.shape[1] // BLOCKS)), (1, 0, 2))


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
