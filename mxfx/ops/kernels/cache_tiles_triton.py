"""Tiles of a packed KV cache as operands of tensor cores, decoded by the lanes that multiply them.

Keys and values (turned over) are left operands. Each lane of a warp holds a few numbers of a row of one, and which
numbers is free where the right operand, which is small, is in the same order. So a lane reads halfwords that lie side
by side, decodes them in its registers, and no code crosses to another lane. Tiles are (4, 8, warps, eights, halfwords):
the compiler gives the first two axes to the lanes of a warp, in this order; the next two count places. Keys have their
4 lanes along a row and 8 along places; values 8 along a row and 4 along places, two for each, which lie side by side
in a register as an operand wants them: places 0 to 3 of eight are the first of pairs, 4 to 7 the second.

Importable only where `triton` is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl

from mxfx.formats import Format
from mxfx.ops.kernels.cache_rows_triton import Row, row_of
from mxfx.ops.kernels.nibbles_triton import float_nibbles, held, narrow_power, nibbles
from mxfx.ops.kernels.packed_triton import element, narrowed, power

#: Lanes along a row.
KEY_LANES, VALUE_LANES = 4, 8


@dataclass(frozen=True)
class Read:
    """How a program reads rows of a cache, `warps` times `places` at a time; compile-time constants.

    Each of `lanes` lanes reads `own` halfwords of a row (in a tile `padded`), of which `alike` in sequence have a scale
    in common. A halfword has `parts` codes, each for a product of its own; but a lane that has too few halfwords to
    fill one brings `joined` parts to it. `paired`: integers or floats of 4 bits, decoded as bfloat16 two at a time.
    """

    row: Row
    lanes: int
    places: int
    warps: int
    parts: int = 1
    own: int = 1
    padded: int = 1
    alike: int = 1
    joined: int = 1
    paired: str = ""

    @property
    def value(self) -> Read:
        """Itself: a kernel meets its constants wrapped, except in the interpreter."""
        return self

    @property
    def plain(self) -> bool:
        return self.row.blocks == 0

    @property
    def halfwords(self) -> int:
        return self.row.width // self.parts

    @property
    def full(self) -> bool:
        return self.lanes * self.padded == self.halfwords

    @property
    def products(self) -> int:
        return self.parts // self.joined

    @property
    def channels(self) -> int:
        """Of one product; of plain rows filled up to what one takes."""
        if self.plain:
            return max(triton.next_power_of_2(self.row.width), 16)
        return self.lanes * self.padded * self.joined


@lru_cache(maxsize=256)
def read_of(width: int, fmt: Format | None, lanes: int, dtype: torch.dtype, places: int, warps: int) -> Read:
    """How rows of `width` elements in a format (None: plain) are read for products in `dtype`."""
    row = row_of(width, fmt)
    if fmt is None or row.codes is None:
        return Read(row, lanes, places, warps)
    parts = 16 // fmt.bits
    own = triton.cdiv(width // parts, lanes)
    padded = triton.next_power_of_2(own)
    paired = {(4, -1, 0): "integer", (4, 1, 1): "float"}.get((fmt.bits, row.codes.mantissa, row.codes.bias), "")
    # Of the smallest left operand a lane holds 4 numbers of a row of keys, 2 of a row of values.
    return Read(
        *(row, lanes, places, warps, parts, own, padded, math.gcd(own, row.block // parts)),
        joined=max(1, 16 // lanes // padded),
        paired=paired if dtype == torch.bfloat16 else "",
    )


@triton.jit
def loaded(cache_ptr, scales_ptr, begin, end, READ: tl.constexpr, WHOLE: tl.constexpr):
    """Rows at the places from `begin` on and their scales, values two and two; zero from `end` on, unless `WHOLE`."""
    left = end - begin
    at = (end - left).to(tl.int64)
    if READ.value.plain:
        place = offsets(READ)[:, :, None]
        lane = tl.arange(0, READ.value.channels)[None, None, :]
        inside = (place < left) & (lane < READ.value.row.width)
        units = tl.load(cache_ptr + (at + place) * READ.value.row.width + lane, mask=inside, other=0.0)
        scales = units
    else:
        cache_ptr += at * READ.value.halfwords
        scales_ptr += at * READ.value.row.blocks
        # As 64 bits, what differs between registers is a constant in the address of a load.
        warp = tl.arange(0, READ.value.warps).to(tl.int64)[None, None, :, None, None]
        eight = tl.arange(0, READ.value.places // 8).to(tl.int64)[None, None, None, :, None]
        first = warp * READ.value.places + eight * 8
        if READ.value.lanes == 4:
            eighth = tl.arange(0, 8).to(tl.int64)[None, :, None, None, None]
            place = first + eighth // 2 + eighth % 2 * 4
            units = _codes(cache_ptr, place, place < left, READ, WHOLE)
            scales = _scales(scales_ptr, place, place < left, READ, WHOLE)
        else:
            one = first + tl.arange(0, 4).to(tl.int64)[:, None, None, None, None]
            two = one + 4
            units = tl.join(
                _codes(cache_ptr, one, one < left, READ, WHOLE), _codes(cache_ptr, two, two < left, READ, WHOLE)
            )
            scales = tl.join(
                _scales(scales_ptr, one, one < left, READ, WHOLE), _scales(scales_ptr, two, two < left, READ, WHOLE)
            )
        units, scales = held(units), held(scales.to(tl.int16))
    return units, scales


@triton.jit
def offsets(READ: tl.constexpr):
    """Which place each row of an operand is, counted from the first: (warps, places)."""
    line = tl.arange(0, READ.value.places)[None, :]
    return tl.arange(0, READ.value.warps)[:, None] * READ.value.places + line // 8 * 8 + line % 8 // 2 + line % 2 * 4


@triton.jit
def _lane(READ: tl.constexpr):
    if READ.value.lanes == 4:
        lane = tl.arange(0, 4)[:, None, None, None, None]
    else:
        lane = tl.arange(0, 8)[None, :, None, None, None]
    return lane.to(tl.int64)


@triton.jit
def _codes(cache_ptr, place, inside, READ: tl.constexpr, WHOLE: tl.constexpr):
    j = tl.arange(0, READ.value.padded)[None, None, None, None, :]
    unit = _lane(READ) * READ.value.own + j
    at = cache_ptr + place * READ.value.halfwords + unit
    if WHOLE and READ.value.full:
        units = tl.load(at)
    else:
        units = tl.load(at, mask=inside & (j < READ.value.own) & (unit < READ.value.halfwords), other=0)
    return units


@triton.jit
def _scales(scales_ptr, place, inside, READ: tl.constexpr, WHOLE: tl.constexpr):
    """E8M0 bytes, one for all halfwords that are alike."""
    alike = tl.arange(0, READ.value.padded // READ.value.alike)[None, None, None, None, :] * READ.value.alike
    block = (_lane(READ) * READ.value.own + alike) // (READ.value.row.block // READ.value.parts)
    at = scales_ptr + place * READ.value.row.blocks + block
    if WHOLE and READ.value.full:
        scales = tl.load(at)
    else:
        scales = tl.load(at, mask=inside & (block < READ.value.row.blocks), other=127)
    return scales


@triton.jit
def powers(bytes, READ: tl.constexpr):
    """The power of two of each halfword: bfloat16 for codes that are decoded two at a time, else float32."""
    ALIKE: tl.constexpr = READ.value.alike
    GROUPS: tl.constexpr = READ.value.padded // ALIKE
    WARPS: tl.constexpr = READ.value.warps
    EIGHTS: tl.constexpr = READ.value.places // 8
    if READ.value.lanes == 4:
        spread = tl.broadcast_to(bytes[:, :, :, :, :, None], (4, 8, WARPS, EIGHTS, GROUPS, ALIKE))
        spread = tl.reshape(spread, (4, 8, WARPS, EIGHTS, GROUPS * ALIKE))
    else:
        spread = tl.broadcast_to(bytes[:, :, :, :, :, None, :], (4, 8, WARPS, EIGHTS, GROUPS, ALIKE, 2))
        spread = tl.reshape(spread, (4, 8, WARPS, EIGHTS, GROUPS * ALIKE, 2))
    return narrow_power(spread) if READ.value.paired != "" else power(spread.to(tl.int32))


@triton.jit
def _elements(units, scale, part: tl.constexpr, READ: tl.constexpr, dtype: tl.constexpr):
    """The codes number `part` of all halfwords, times their scales. Exact."""
    if READ.value.paired == "integer":
        values = nibbles(units, scale, part, dtype)
    elif READ.value.paired == "float":
        values = float_nibbles(units, scale, part, dtype)
    else:
        CODES: tl.constexpr = READ.value.row.codes
        shift: tl.constexpr = 32 - READ.value.row.bits * (part + 1)
        values = narrowed(element(units.to(tl.int32) << shift, CODES) * scale, dtype)
    return values


@triton.jit
def key_tile(units, scale, number: tl.constexpr, READ: tl.constexpr, dtype: tl.constexpr):
    """The left operand of product `number`, (warps, places, channels)."""
    J: tl.constexpr = READ.value.padded
    PART: tl.constexpr = number * READ.value.joined
    WARPS: tl.constexpr = READ.value.warps
    PLACES: tl.constexpr = READ.value.places
    EIGHTS: tl.constexpr = READ.value.places // 8
    CHANNELS: tl.constexpr = READ.value.channels
    values = _elements(units, scale, PART, READ, dtype)
    if READ.value.joined == 1:
        tile = tl.reshape(values, (4, 8, WARPS, EIGHTS, J // 4, 2, 2))
        tile = tl.permute(tile, (2, 3, 1, 4, 5, 0, 6))
    else:
        tile = tl.permute(tl.join(values, _elements(units, scale, PART + 1, READ, dtype)), (2, 3, 1, 5, 0, 4))
    return tl.reshape(tile, (WARPS, PLACES, CHANNELS))


@triton.jit
def key_channels(number: tl.constexpr, READ: tl.constexpr):
    """Which channel each column of that operand is; the width or more where it is none."""
    column = tl.arange(0, READ.value.channels)
    if READ.value.plain:
        channel = column
    else:
        lane = column // 2 % 4
        if READ.value.joined == 1:
            j = column // 16 * 4 + column // 8 % 2 * 2 + column % 2
            part = number
        else:
            j = column % 2
            part = number * 2 + column // 8
        channel = tl.where(
            j < READ.value.own, (lane * READ.value.own + j) * READ.value.parts + part, READ.value.row.width
        )
    return channel


@triton.jit
def value_tile(units, scale, number: tl.constexpr, READ: tl.constexpr, dtype: tl.constexpr):
    """The left operand of product `number`, (warps, channels, places)."""
    PART: tl.constexpr = number * READ.value.joined
    WARPS: tl.constexpr = READ.value.warps
    PLACES: tl.constexpr = READ.value.places
    CHANNELS: tl.constexpr = READ.value.channels
    values = _elements(units, scale, PART, READ, dtype)
    if READ.value.joined == 1:
        tile = tl.permute(values, (2, 4, 1, 3, 0, 5))
    else:
        tile = tl.permute(tl.join(values, _elements(units, scale, PART + 1, READ, dtype)), (2, 4, 6, 1, 3, 0, 5))
    return tl.reshape(tile, (WARPS, CHANNELS, PLACES))


@triton.jit
def value_channels(line, READ: tl.constexpr):
    """Which channel each row of that operand is, those of all products counted; the width or more where it is none."""
    if READ.value.plain:
        channel = line
    else:
        eight = line % READ.value.channels // 8
        j = eight // READ.value.joined
        part = line // READ.value.channels * READ.value.joined + eight % READ.value.joined
        unit = line % 8 * READ.value.own + j
        channel = tl.where(j < READ.value.own, unit * READ.value.parts + part, READ.value.row.width)
    return channel
