"""A step of decoding on a GPU: attention that reads the codes of a cache as they are.

Attention is split over the length, so that a batch of one fills the device: each program takes a stretch of places for
one key-value head and all query heads that share it, keeps a running softmax (arXiv 2205.14135), and a second kernel
joins the stretches. How many places are filled is read on the device: a recorded graph serves every length.

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
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mxfx.algorithms.launch import on_device_of
from mxfx.formats import Format
from mxfx.ops.kernels.cache_rows_triton import Caches, Row, row_of
from mxfx.ops.kernels.packed_triton import element, fused_nibbles, narrow_power, narrowed, nibbles, power

#: By whether the cache is packed: places that a warp meets at a time, warps of a program, warps that a device should have
#: to do with.
PLACES = {True: 64, False: 32}
WARPS = {True: 1, False: 4}
TOGETHER = {True: 2112, False: 1056}
#: Channels of a row that one program joins.
JOINED = 16
#: How a 4-bit integer meets its scale: 3 or 4 instructions for two of them.
FUSED = False
#: Whether codes are loaded while those before are met.
AHEAD = False
#: Whether the stretches are joined by a kernel that starts while the last of them are met.
OVERLAPS = False
OPTIONS: dict[str, int] = {}
_LOG2_E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True)
class Read:
    """How a warp reads rows of a cache; compile-time constants.

    Keys are the left operand of a product, and values, turned over, that of another. Each of its lanes holds a few
    numbers of a row, and which ones is free where the other operand, which is small, is in the same order. So each of
    `lanes` lanes reads `own` halfwords that lie side by side (in a tile `padded`) and decodes them where they are
    multiplied: no code crosses from lane to lane. A halfword has `parts` codes, each a product of its own; but `joined`
    of them where a lane has too few halfwords to fill one. `alike` halfwords have a scale in common.
    """

    row: Row
    lanes: int
    parts: int = 1
    own: int = 1
    padded: int = 1
    alike: int = 1
    joined: int = 1
    bf16: bool = False

    @property
    def value(self) -> Read:
        """Itself: a kernel meets its constants wrapped, except in the interpreter."""
        return self

    @property
    def halfwords(self) -> int:
        return self.row.width // self.parts

    @property
    def full(self) -> bool:
        return self.lanes * self.padded == self.halfwords


@lru_cache(maxsize=256)
def read_of(width: int, fmt: Format | None, lanes: int, dtype: torch.dtype) -> Read:
    """How rows of `width` elements in a format are read: keys by 4 lanes, values by 8."""
    row = row_of(width, fmt)
    if fmt is None:
        return Read(row, lanes)
    parts = 16 // fmt.bits
    own = triton.cdiv(width // parts, lanes)
    padded = triton.next_power_of_2(own)
    # Numbers of a row that a lane holds in the smallest left operand: 4 of a key, 2 of a value.
    joined = max(1, 16 // lanes // padded)
    bf16 = row.codes is not None and row.codes.mantissa < 0 and fmt.bits == 4 and dtype == torch.bfloat16
    return Read(row, lanes, parts, own, padded, math.gcd(own, row.block // parts), joined, bf16)


def attend_token(
    q: Tensor,
    caches: Caches,
    bias: Tensor | None,
    slots: Tensor,
    scale: float,
    width: int,
    key_format: Format | None,
    value_format: Format | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of one query token `q` (batch, heads, 1, width) to all places up to `slots[0]`.

    `bias` is boolean (batch | 1, 1, 1, room), True where the query may attend; `sinks` are (heads,). Returns (batch,
    heads, 1, `width` of v).
    """
    keys, values, key_scales, value_scales = caches
    batch, heads = q.shape[:2]
    kv_heads, room = keys.shape[1:3]
    group = heads // kv_heads
    packed = key_scales is not None or value_scales is not None
    warps, places = WARPS[packed], PLACES[packed]
    stretches = max(1, min(TOGETHER[packed] // (batch * kv_heads * warps), triton.cdiv(room, places * warps)))
    q = q.contiguous()
    out = torch.empty((batch, heads, 1, width), dtype=q.dtype, device=q.device)
    alone = stretches == 1
    partial, sums = out, out[None]
    if not alone:
        partial = torch.empty((batch * heads, stretches, width), dtype=torch.float32, device=q.device)
        sums = torch.empty((2, batch * heads, stretches), dtype=torch.float32, device=q.device)
    ks, vs = (keys if key_scales is None else key_scales), (values if value_scales is None else value_scales)
    key, value = read_of(q.shape[-1], key_format, 4, q.dtype), read_of(width, value_format, 8, q.dtype)
    keys = keys if key_scales is None else keys.view(torch.int16)
    values = values if value_scales is None else values.view(torch.int16)
    given = q if bias is None else bias.expand(batch, 1, 1, room)
    with on_device_of(q):
        _attend_kernel[(batch * kv_heads, stretches)](
            q, keys, values, ks, vs, given, slots, partial, sums[0], sums[-1],
            out if sinks is None else sinks, kv_heads, room, stretches, scale, 1.0 if softcap is None else softcap,
            *keys.stride()[:2], *values.stride()[:2], *ks.stride()[:2], *vs.stride()[:2],
            0 if bias is None else given.stride(0),
            KEY=key, VALUE=value,
            GROUP=group, GROUP_PADDED=max(8, triton.next_power_of_2(group)),
            PLACES=places, WARPS=warps, HAS_BIAS=bias is not None, HAS_CAP=softcap is not None, FUSED=FUSED,
            AHEAD=packed and AHEAD, OVERLAPS=OVERLAPS and not alone,
            ALONE=alone, HAS_SINKS=sinks is not None, num_warps=warps, num_stages=1 if packed else 2, **OPTIONS,
        )  # fmt: skip
        if alone:
            return out
        _join_kernel[(batch * heads, triton.cdiv(width, JOINED))](
            partial, sums[0], sums[1], out, out if sinks is None else sinks, stretches, heads,
            HAS_SINKS=sinks is not None, WIDTH=width, LANES=JOINED,
            STRETCHES=triton.next_power_of_2(stretches), OVERLAPS=OVERLAPS, num_warps=4,
            **({"launch_pdl": True} if OVERLAPS else {}),
        )  # fmt: skip
    return out


@triton.constexpr_function
def _plain_padded(read):
    """Channels of a plain row, filled up to a power of two and what a product takes at least."""
    return max(triton.next_power_of_2(read.value.row.width), 16)


@triton.jit
def _codes(cache_ptr, place, inside, READ: tl.constexpr, WHOLE: tl.constexpr):
    """Halfwords (4, 8, warps, eights of places, halfwords) of the lanes, of which keys have 4 and values 8."""
    j = tl.arange(0, READ.value.padded)[None, None, None, None, :]
    lane = _lane(READ)
    unit = lane * READ.value.own + j
    at = place * READ.value.halfwords + unit
    if READ.value.full:
        mask = inside
    else:
        mask = inside & (j < READ.value.own) & (unit < READ.value.halfwords)
    if WHOLE and READ.value.full:
        units = tl.load(cache_ptr + at)
    else:
        units = tl.load(cache_ptr + at, mask=mask, other=0)
    return units


@triton.jit
def _scales(scales_ptr, place, inside, READ: tl.constexpr, WHOLE: tl.constexpr):
    """E8M0 bytes (4, 8, warps, eights of places, scales of a lane)."""
    ALIKE: tl.constexpr = READ.value.alike
    first = _lane(READ) * READ.value.own + tl.arange(0, READ.value.padded // ALIKE)[None, None, None, None, :] * ALIKE
    block = first // (READ.value.row.block // READ.value.parts)
    at = place * READ.value.row.blocks + block
    if WHOLE and READ.value.full:
        scales = tl.load(scales_ptr + at)
    else:
        scales = tl.load(scales_ptr + at, mask=inside & (block < READ.value.row.blocks), other=127)
    return scales


@triton.jit
def _lane(READ: tl.constexpr):
    if READ.value.lanes == 4:
        lane = tl.arange(0, 4).to(tl.int64)[:, None, None, None, None]
    else:
        lane = tl.arange(0, 8).to(tl.int64)[None, :, None, None, None]
    return lane


@triton.jit
def _powers(bytes, READ: tl.constexpr):
    """E8M0 bytes, one for each halfword, as powers of two: bfloat16 for 4-bit integers beside it, else float32."""
    if READ.value.bf16:
        powers = narrow_power(bytes.to(tl.int16))
    else:
        powers = power(bytes.to(tl.int32))
    return powers


@triton.jit
def _elements(units, powers, part: tl.constexpr, READ: tl.constexpr, FUSED: tl.constexpr, dtype: tl.constexpr):
    """The codes number `part` of all halfwords, times their scales, of the shape of `units`. Exact."""
    if READ.value.bf16:
        if FUSED:
            less = (powers.to(tl.float32) * -136.0).to(tl.bfloat16)
            values = fused_nibbles(units, powers, less, part, dtype)
        else:
            values = nibbles(units, powers, part, dtype)
    else:
        shift: tl.constexpr = 32 - READ.value.row.bits * (part + 1)
        CODES: tl.constexpr = READ.value.row.codes
        values = narrowed(element(units.to(tl.int32) << shift, CODES) * powers, dtype)
    return values


@triton.jit
def _spread(bytes, READ: tl.constexpr, TURNS: tl.constexpr, WARPS: tl.constexpr):
    """Scales for each halfword of a lane: (…, halfwords)."""
    ALIKE: tl.constexpr = READ.value.alike
    GROUPS: tl.constexpr = READ.value.padded // ALIKE
    spread = tl.broadcast_to(bytes[:, :, :, :, :, None], (4, 8, WARPS, TURNS, GROUPS, ALIKE))
    return tl.reshape(spread, (4, 8, WARPS, TURNS, GROUPS * ALIKE))


@triton.jit
def _spread_pairs(bytes, READ: tl.constexpr, TURNS: tl.constexpr, WARPS: tl.constexpr):
    """As `_spread`, for two places: (…, halfwords, 2)."""
    ALIKE: tl.constexpr = READ.value.alike
    GROUPS: tl.constexpr = READ.value.padded // ALIKE
    spread = tl.broadcast_to(bytes[:, :, :, :, :, None, :], (4, 8, WARPS, TURNS, GROUPS, ALIKE, 2))
    return tl.reshape(spread, (4, 8, WARPS, TURNS, GROUPS * ALIKE, 2))


@triton.jit
def _key_tile(
    units, powers, part: tl.constexpr, READ: tl.constexpr, PLACES: tl.constexpr, WARPS: tl.constexpr,
    FUSED: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """The left operand of part `part`, (warps, places, channels)."""
    TURNS: tl.constexpr = PLACES // 8
    J: tl.constexpr = READ.value.padded
    values = _elements(units, powers, part, READ, FUSED, dtype)
    if READ.value.joined == 1:
        tile = tl.reshape(values, (4, 8, WARPS, TURNS, J // 4, 2, 2))
        tile = tl.permute(tile, (2, 3, 1, 4, 5, 0, 6))
        tile = tl.reshape(tile, (WARPS, PLACES, 4 * J))
    else:
        tile = tl.join(values, _elements(units, powers, part + 1, READ, FUSED, dtype))
        tile = tl.reshape(tl.permute(tile, (2, 3, 1, 5, 0, 4)), (WARPS, PLACES, 16))
    return tile


@triton.jit
def _key_channel(part: tl.constexpr, READ: tl.constexpr):
    """Which channel each column of that operand is; the width or more where it is none."""
    PARTS: tl.constexpr = READ.value.parts
    J: tl.constexpr = READ.value.padded
    if READ.value.row.blocks == 0:
        channel = tl.arange(0, _plain_padded(READ))
    else:
        column = tl.arange(0, 4 * J * READ.value.joined)
        lane = (column // 2) % 4
        if READ.value.joined == 1:
            j = column // 16 * 4 + column // 8 % 2 * 2 + column % 2
            more = 0
        else:
            j = column % 2
            more = column // 8
        unit = lane * READ.value.own + j
        channel = tl.where((j < READ.value.own), unit * PARTS + part + more, READ.value.row.width)
    return channel


@triton.jit
def _value_tile(
    units, powers, part: tl.constexpr, READ: tl.constexpr, PLACES: tl.constexpr, WARPS: tl.constexpr,
    FUSED: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """The left operand of part `part`, (warps, channels, places): places lie two by two."""
    J: tl.constexpr = READ.value.padded
    values = _elements(units, powers, part, READ, FUSED, dtype)
    if READ.value.joined == 1:
        tile = tl.reshape(tl.permute(values, (2, 4, 1, 3, 0, 5)), (WARPS, 8 * J, PLACES))
    else:
        tile = tl.join(values, _elements(units, powers, part + 1, READ, FUSED, dtype))
        tile = tl.reshape(tl.permute(tile, (2, 4, 6, 1, 3, 0, 5)), (WARPS, 16, PLACES))
    return tile


@triton.jit
def _value_channel(part: tl.constexpr, READ: tl.constexpr):
    """Which channel each row of that operand is; the width or more where it is none."""
    if READ.value.row.blocks == 0:
        channel = tl.arange(0, _plain_padded(READ))
    else:
        line = tl.arange(0, 8 * READ.value.padded * READ.value.joined)
        lane = line % 8
        j = line // 8 // READ.value.joined
        more = line // 8 % READ.value.joined
        unit = lane * READ.value.own + j
        channel = tl.where(j < READ.value.own, unit * READ.value.parts + part + more, READ.value.row.width)
    return channel


@triton.jit
def _plain(cache_ptr, place, inside, READ: tl.constexpr):
    """Rows (warps, places, channels)."""
    WIDTH: tl.constexpr = READ.value.row.width
    lane = tl.arange(0, _plain_padded(READ))[None, None, :]
    return tl.load(cache_ptr + place * WIDTH + lane, mask=inside & (lane < WIDTH), other=0.0)


@triton.jit
def _loaded(
    keys_ptr, key_scales_ptr, values_ptr, value_scales_ptr, begin, end,
    KEY: tl.constexpr, VALUE: tl.constexpr, PLACES: tl.constexpr, WARPS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """What lies at the places from `begin` on: keys, their scales, values of the first and second of two places, scales.

    Within eight places, the first four are the first of pairs, and the other four the second.
    """
    TURNS: tl.constexpr = PLACES // 8
    # With the lanes first, the compiler gives them to the threads of a warp in this order.
    quarter = tl.arange(0, 4).to(tl.int64)[:, None, None, None, None]
    eighth = tl.arange(0, 8).to(tl.int64)[None, :, None, None, None]
    warp = tl.arange(0, WARPS).to(tl.int64)[None, None, :, None, None]
    turn = tl.arange(0, TURNS).to(tl.int64)[None, None, None, :, None]
    left = end - begin
    at = (end - left).to(tl.int64)
    line = tl.arange(0, PLACES)[None, :, None]
    plain = tl.arange(0, WARPS)[:, None, None] * PLACES + line // 8 * 8 + line % 8 // 2 + line % 2 * 4
    if KEY.value.row.blocks == 0:
        kc = _plain(keys_ptr + at * KEY.value.row.width, plain, plain < left, KEY)
        ks = kc
    else:
        place = warp * PLACES + turn * 8 + eighth // 2 + eighth % 2 * 4
        kc = _codes(keys_ptr + at * KEY.value.halfwords, place, place < left, KEY, WHOLE)
        ks = _scales(key_scales_ptr + at * KEY.value.row.blocks, place, place < left, KEY, WHOLE)
    if VALUE.value.row.blocks == 0:
        vc = _plain(values_ptr + at * VALUE.value.row.width, plain, plain < left, VALUE)
        vs = vc
    else:
        place = warp * PLACES + turn * 8 + quarter
        values_ptr += at * VALUE.value.halfwords
        value_scales_ptr += at * VALUE.value.row.blocks
        vc = tl.join(
            _codes(values_ptr, place, place < left, VALUE, WHOLE),
            _codes(values_ptr, place + 4, place + 4 < left, VALUE, WHOLE),
        )
        vs = tl.join(
            _scales(value_scales_ptr, place, place < left, VALUE, WHOLE),
            _scales(value_scales_ptr, place + 4, place + 4 < left, VALUE, WHOLE),
        )
    return kc, ks, vc, vs


@triton.jit
def _query(q_ptr, row, real, part: tl.constexpr, KEY: tl.constexpr, WARPS: tl.constexpr, GROUP: tl.constexpr):
    """The right operand of part `part`, (warps, channels, query heads)."""
    channel = _key_channel(part, KEY)
    at = row[None, :] * KEY.value.row.width + channel[:, None]
    q = tl.load(q_ptr + at, mask=real[None, :] & (channel < KEY.value.row.width)[:, None], other=0.0)
    return tl.broadcast_to(q[None], (WARPS, channel.shape[0], GROUP))


@triton.jit
def _met(
    kc, ks, vc, vs, q0, q1, q2, q3, largest, total, o0, o1, o2, o3, bias_ptr, begin, end, scale, softcap,
    KEY: tl.constexpr, VALUE: tl.constexpr, PLACES: tl.constexpr, WARPS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, FUSED: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """The running softmax and its sums, with the places from `begin` on."""
    TURNS: tl.constexpr = PLACES // 8
    KEY_PRODUCTS: tl.constexpr = KEY.value.parts // KEY.value.joined
    VALUE_PRODUCTS: tl.constexpr = VALUE.value.parts // VALUE.value.joined
    KEY_STEP: tl.constexpr = KEY.value.joined
    VALUE_STEP: tl.constexpr = VALUE.value.joined
    line = tl.arange(0, PLACES)
    offset = line // 8 * 8 + line % 8 // 2 + line % 2 * 4
    offset = tl.arange(0, WARPS)[:, None] * PLACES + offset[None, :]
    if KEY.value.row.blocks == 0:
        scores = tl.dot(kc, q0, input_precision="ieee")
    else:
        powers = _powers(_spread(ks, KEY, TURNS, WARPS), KEY)
        tile = _key_tile(kc, powers, 0, KEY, PLACES, WARPS, FUSED, dtype)
        scores = tl.dot(tile, q0, input_precision="ieee")
        if KEY_PRODUCTS > 1:
            tile = _key_tile(kc, powers, KEY_STEP, KEY, PLACES, WARPS, FUSED, dtype)
            scores = tl.dot(tile, q1, scores, input_precision="ieee")
        if KEY_PRODUCTS > 2:
            tile = _key_tile(kc, powers, 2, KEY, PLACES, WARPS, FUSED, dtype)
            scores = tl.dot(tile, q2, scores, input_precision="ieee")
            tile = _key_tile(kc, powers, 3, KEY, PLACES, WARPS, FUSED, dtype)
            scores = tl.dot(tile, q3, scores, input_precision="ieee")
    place = begin + offset
    seen = place < end
    if HAS_BIAS:
        seen = seen & (tl.load(bias_ptr + place, mask=seen, other=0) != 0)
    scores *= scale
    if HAS_CAP:
        # tanh(x) = 1 - 2 / (exp(2x) + 1)
        scores = softcap - 2 * softcap / (tl.exp2(scores / softcap * (2 * _LOG2_E)) + 1)
    scores = tl.where(seen[:, :, None], scores * _LOG2_E, float("-inf"))
    peak = tl.maximum(largest, tl.max(scores, 1))
    # Nothing seen yet: any finite number keeps the differences defined.
    base = tl.where(peak == float("-inf"), 0.0, peak)
    shrink = tl.exp2(largest - base)
    p = tl.exp2(scores - base[:, None, :])
    total = total * shrink + tl.sum(p, 1)
    shrink = shrink[:, None, :]
    p = p.to(dtype)
    if VALUE.value.row.blocks == 0:
        o0 = tl.dot(tl.permute(vc, (0, 2, 1)), p, o0 * shrink, input_precision="ieee")
    else:
        powers = _powers(_spread_pairs(vs, VALUE, TURNS, WARPS), VALUE)
        tile = _value_tile(vc, powers, 0, VALUE, PLACES, WARPS, FUSED, dtype)
        o0 = tl.dot(tile, p, o0 * shrink, input_precision="ieee")
        if VALUE_PRODUCTS > 1:
            tile = _value_tile(vc, powers, VALUE_STEP, VALUE, PLACES, WARPS, FUSED, dtype)
            o1 = tl.dot(tile, p, o1 * shrink, input_precision="ieee")
        if VALUE_PRODUCTS > 2:
            tile = _value_tile(vc, powers, 2, VALUE, PLACES, WARPS, FUSED, dtype)
            o2 = tl.dot(tile, p, o2 * shrink, input_precision="ieee")
            tile = _value_tile(vc, powers, 3, VALUE, PLACES, WARPS, FUSED, dtype)
            o3 = tl.dot(tile, p, o3 * shrink, input_precision="ieee")
    return peak, total, o0, o1, o2, o3


@triton.jit
def _attend_kernel(
    q_ptr,
    keys_ptr,
    values_ptr,
    key_scales_ptr,
    value_scales_ptr,
    bias_ptr,
    slots_ptr,
    partial_ptr,
    largest_ptr,
    total_ptr,
    sinks_ptr,
    kv_heads,
    room,
    stretches,
    scale,
    softcap,
    keys_batch,
    keys_head,
    values_batch,
    values_head,
    key_scales_batch,
    key_scales_head,
    value_scales_batch,
    value_scales_head,
    bias_batch,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    PLACES: tl.constexpr,
    WARPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    FUSED: tl.constexpr,
    AHEAD: tl.constexpr,
    OVERLAPS: tl.constexpr,
    ALONE: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """A stretch of places for one text and key-value head; each warp takes places of its own."""
    pair, stretch = tl.program_id(0), tl.program_id(1)
    batch, head = (pair // kv_heads).to(tl.int64), (pair % kv_heads).to(tl.int64)
    keys_ptr += batch * keys_batch + head * keys_head
    values_ptr += batch * values_batch + head * values_head
    key_scales_ptr += batch * key_scales_batch + head * key_scales_head
    value_scales_ptr += batch * value_scales_batch + head * value_scales_head
    bias_ptr += batch * bias_batch
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    ACROSS: tl.constexpr = PLACES * WARPS
    TURNS: tl.constexpr = PLACES // 8
    KEY_PRODUCTS: tl.constexpr = KEY.value.parts // KEY.value.joined
    VALUE_PRODUCTS: tl.constexpr = VALUE.value.parts // VALUE.value.joined
    KEY_STEP: tl.constexpr = KEY.value.joined
    VALUE_STEP: tl.constexpr = VALUE.value.joined
    member = tl.arange(0, GROUP_PADDED)
    row = pair.to(tl.int64) * GROUP + member
    real = member < GROUP
    q0 = _query(q_ptr, row, real, 0, KEY, WARPS, GROUP_PADDED)
    q1, q2, q3 = q0, q0, q0
    if KEY_PRODUCTS > 1:
        q1 = _query(q_ptr, row, real, KEY_STEP, KEY, WARPS, GROUP_PADDED)
    if KEY_PRODUCTS > 2:
        q2 = _query(q_ptr, row, real, 2, KEY, WARPS, GROUP_PADDED)
        q3 = _query(q_ptr, row, real, 3, KEY, WARPS, GROUP_PADDED)
    filled = tl.minimum(tl.load(slots_ptr) + 1, room).to(tl.int32)
    share = tl.cdiv(tl.cdiv(filled, ACROSS), stretches) * ACROSS
    start = stretch * share
    end = tl.minimum(start + share, filled)
    lane = _value_channel(0, VALUE)
    largest = tl.full([WARPS, GROUP_PADDED], float("-inf"), tl.float32)
    total = tl.zeros([WARPS, GROUP_PADDED], tl.float32)
    o0 = tl.zeros([WARPS, lane.shape[0], GROUP_PADDED], tl.float32)
    o1, o2, o3 = o0, o0, o0
    whole = start + (end - start) // ACROSS * ACROSS
    if AHEAD:
        # What is behind the last whole tile is loaded without need, where there is none.
        kc, ks, vc, vs = _loaded(
            keys_ptr, key_scales_ptr, values_ptr, value_scales_ptr, start, whole, KEY, VALUE, PLACES, WARPS, False
        )
        for begin in range(start, whole, ACROSS):
            now = kc, ks, vc, vs
            if begin + ACROSS < whole:
                kc, ks, vc, vs = _loaded(
                    keys_ptr, key_scales_ptr, values_ptr, value_scales_ptr,
                    begin + ACROSS, end, KEY, VALUE, PLACES, WARPS, True,
                )  # fmt: skip
            largest, total, o0, o1, o2, o3 = _met(
                *now, q0, q1, q2, q3, largest, total, o0, o1, o2, o3, bias_ptr, begin, end, scale, softcap,
                KEY, VALUE, PLACES, WARPS, HAS_BIAS, HAS_CAP, FUSED, dtype,
            )  # fmt: skip
    else:
        for begin in range(start, whole, ACROSS):
            kc, ks, vc, vs = _loaded(
                keys_ptr, key_scales_ptr, values_ptr, value_scales_ptr, begin, end, KEY, VALUE, PLACES, WARPS, True
            )
            largest, total, o0, o1, o2, o3 = _met(
                kc, ks, vc, vs, q0, q1, q2, q3, largest, total, o0, o1, o2, o3, bias_ptr, begin, end, scale, softcap,
                KEY, VALUE, PLACES, WARPS, HAS_BIAS, HAS_CAP, FUSED, dtype,
            )  # fmt: skip
    if whole < end:
        kc, ks, vc, vs = _loaded(
            keys_ptr, key_scales_ptr, values_ptr, value_scales_ptr, whole, end, KEY, VALUE, PLACES, WARPS, False
        )
        largest, total, o0, o1, o2, o3 = _met(
            kc, ks, vc, vs, q0, q1, q2, q3, largest, total, o0, o1, o2, o3, bias_ptr, whole, end, scale, softcap,
            KEY, VALUE, PLACES, WARPS, HAS_BIAS, HAS_CAP, FUSED, dtype,
        )  # fmt: skip
    if OVERLAPS:
        gdc_launch_dependents()
    # The warps' sums, each by its share.
    peak = tl.max(largest, 0)
    if ALONE and HAS_SINKS:
        sink = tl.load(sinks_ptr + head * GROUP + member, mask=real, other=0.0).to(tl.float32) * _LOG2_E
        peak = tl.maximum(peak, sink)
    base = tl.where(peak == float("-inf"), 0.0, peak)
    shrink = tl.exp2(largest - base[None, :])
    total = tl.sum(total * shrink, 0)
    if ALONE:
        if HAS_SINKS:
            total += tl.exp2(sink - base)
        shrink = shrink / total[None, :]
    shrink = shrink[:, None, :]
    out = partial_ptr + (row * stretches + stretch)[None, :] * VALUE.value.row.width
    _put(out, tl.sum(o0 * shrink, 0), _value_channel(0, VALUE), real, VALUE)
    if VALUE_PRODUCTS > 1:
        _put(out, tl.sum(o1 * shrink, 0), _value_channel(VALUE_STEP, VALUE), real, VALUE)
    if VALUE_PRODUCTS > 2:
        _put(out, tl.sum(o2 * shrink, 0), _value_channel(2, VALUE), real, VALUE)
        _put(out, tl.sum(o3 * shrink, 0), _value_channel(3, VALUE), real, VALUE)
    if not ALONE:
        tl.store(largest_ptr + row * stretches + stretch, peak, mask=real)
        tl.store(total_ptr + row * stretches + stretch, total, mask=real)


@triton.jit
def _put(out_ptr, sums, channel, real, VALUE: tl.constexpr):
    kept = real[None, :] & (channel < VALUE.value.row.width)[:, None]
    tl.store(out_ptr + channel[:, None], sums.to(out_ptr.dtype.element_ty), mask=kept)


@triton.jit
def _join_kernel(
    partial_ptr,
    largest_ptr,
    total_ptr,
    out_ptr,
    sinks_ptr,
    stretches,
    heads,
    HAS_SINKS: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    STRETCHES: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One program a text, a query head and a few channels: the stretches' sums, each by its share of the softmax."""
    row = tl.program_id(0).to(tl.int64)
    stretch = tl.arange(0, STRETCHES)
    if OVERLAPS:
        gdc_wait()
    lane = tl.program_id(1) * LANES + tl.arange(0, LANES)
    here = stretch < stretches
    largest = tl.load(largest_ptr + row * stretches + stretch, mask=here, other=float("-inf"))
    total = tl.load(total_ptr + row * stretches + stretch, mask=here, other=0.0)
    peak = tl.max(largest, 0)
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + row % heads).to(tl.float32) * _LOG2_E
        peak = tl.maximum(peak, sink)
    share = tl.exp2(largest - peak)
    whole = tl.sum(total * share, 0)
    if HAS_SINKS:
        whole += tl.exp2(sink - peak)
    mask = here[:, None] & (lane < WIDTH)[None, :]
    parts = tl.load(partial_ptr + (row * stretches + stretch[:, None]) * WIDTH + lane[None, :], mask=mask, other=0.0)
    joined = tl.sum(parts * share[:, None], 0) / whole
    tl.store(out_ptr + row * WIDTH + lane, joined.to(out_ptr.dtype.element_ty), mask=lane < WIDTH)
