"""A step of decoding on a GPU: attention that reads the codes of a cache as they are.

Attention is split over the length, so that a batch of one fills the device: each program takes a stretch of places for
one key-value head and all query heads that share it, keeps a running softmax (arXiv 2205.14135), and a second kernel
joins the stretches. How many places are filled is read on the device: a recorded graph serves every length.

Importable only where `triton` is.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxfx.algorithms.launch import on_device_of
from mxfx.formats import Format
from mxfx.ops.kernels.cache_rows_triton import Caches, Row, row_of
from mxfx.ops.kernels.packed_triton import element, narrowed, nibbles, power

#: Places that a program meets at a time; by whether the cache is packed, its warps, and programs that a device should
#: have to do. One warp decodes and multiplies without waiting for others; plain rows want several to load them.
PLACES = 64
WARPS = {True: 1, False: 4}
PROGRAMS = {True: 1056, False: 264}
#: Channels of a row that one program joins.
JOINED = 16
_LOG2_E = tl.constexpr(1.4426950408889634)


@lru_cache(maxsize=256)
def _read_as(row: Row, dtype: torch.dtype) -> Row:
    """A row with how it is read; a product takes at least 16 channels at a time."""
    integers = row.codes is not None and row.codes.mantissa < 0 and row.bits == 4
    return replace(row, halfwords=integers and dtype == torch.bfloat16 and row.width >= 64)


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
    stretches = max(1, min(PROGRAMS[packed] // (batch * kv_heads), triton.cdiv(room, PLACES)))
    q = q.contiguous()
    out = torch.empty((batch, heads, 1, width), dtype=q.dtype, device=q.device)
    partial = torch.empty((batch * heads, stretches, width), dtype=torch.float32, device=q.device)
    sums = torch.empty((2, batch * heads, stretches), dtype=torch.float32, device=q.device)
    ks, vs = (keys if key_scales is None else key_scales), (values if value_scales is None else value_scales)
    key_row, value_row = (
        _read_as(row_of(x, fmt), q.dtype) for x, fmt in ((q.shape[-1], key_format), (width, value_format))
    )
    keys = keys.view(torch.int16) if key_row.halfwords else keys
    values = values.view(torch.int16) if value_row.halfwords else values
    given = q if bias is None else bias.expand(batch, 1, 1, room)
    with on_device_of(q):
        _attend_kernel[(batch * kv_heads, stretches)](
            q, keys, values, ks, vs, given, slots, partial, sums, sums[1],
            kv_heads, room, stretches, scale, 1.0 if softcap is None else softcap,
            *keys.stride()[:2], *values.stride()[:2], *ks.stride()[:2], *vs.stride()[:2],
            0 if bias is None else given.stride(0),
            KEY=key_row, VALUE=value_row,
            GROUP=group, GROUP_PADDED=max(8, triton.next_power_of_2(group)),
            PLACES=PLACES, HAS_BIAS=bias is not None, HAS_CAP=softcap is not None, num_warps=WARPS[packed],
        )  # fmt: skip
        _join_kernel[(batch * heads, triton.cdiv(width, JOINED))](
            partial, sums, sums[1], out, out if sinks is None else sinks, stretches, heads, HAS_SINKS=sinks is not None,
            WIDTH=width, LANES=JOINED,
            STRETCHES=triton.next_power_of_2(stretches), num_warps=4,
        )  # fmt: skip
    return out


@triton.constexpr_function
def _parts(row):
    """Channels whose codes are loaded together."""
    return 1 if row.value.bits != 4 else 4 if row.value.halfwords else 2


@triton.constexpr_function
def _padded(row):
    """Channels of a row with those that fill up a power of two, and what a product takes at least."""
    row = row.value
    if row.blocks == 0:
        return max(triton.next_power_of_2(row.width), 16)
    return triton.next_power_of_2(row.blocks) * row.block


@triton.jit
def _codes_tile(cache_ptr, place, inside, ROW: tl.constexpr, PLACES: tl.constexpr):
    """Units (places, blocks, units of a block), zero outside: bytes as int32, or halfwords as they are."""
    UNITS: tl.constexpr = ROW.value.block // _parts(ROW)
    BLOCKS_PADDED: tl.constexpr = triton.next_power_of_2(ROW.value.blocks)
    block = tl.arange(0, BLOCKS_PADDED)[None, :, None]
    at = place[:, None, None] * (ROW.value.blocks * UNITS) + block * UNITS + tl.arange(0, UNITS)[None, None, :]
    mask = inside[:, None, None] & (block < ROW.value.blocks)
    units = tl.load(cache_ptr + at, mask=mask, other=0)
    return units if ROW.value.halfwords else units.to(tl.int32)


@triton.jit
def _scales_tile(scales_ptr, place, inside, ROW: tl.constexpr):
    """Powers of two (places, blocks, 1), 1 outside: bfloat16 for halfwords, else float32."""
    BLOCKS_PADDED: tl.constexpr = triton.next_power_of_2(ROW.value.blocks)
    block = tl.arange(0, BLOCKS_PADDED)[None, :, None]
    mask = inside[:, None, None] & (block < ROW.value.blocks)
    at = place[:, None, None] * ROW.value.blocks + block
    scale = power(tl.load(scales_ptr + at, mask=mask, other=127).to(tl.int32))
    return narrowed(scale, tl.bfloat16) if ROW.value.halfwords else scale


@triton.jit
def _element_tile(units, scale, part: tl.constexpr, ROW: tl.constexpr, PLACES: tl.constexpr, dtype: tl.constexpr):
    """The elements number `part` of all units, times their scales: (places, channels) of `dtype`. Exact."""
    UNITS: tl.constexpr = ROW.value.block // _parts(ROW)
    BLOCKS_PADDED: tl.constexpr = triton.next_power_of_2(ROW.value.blocks)
    CODES: tl.constexpr = ROW.value.codes
    if ROW.value.halfwords:
        scale = tl.broadcast_to(scale, (PLACES, BLOCKS_PADDED, UNITS))
        values = nibbles(units, scale, part, dtype)
        tile = tl.reshape(values, (PLACES, BLOCKS_PADDED * UNITS))
    else:
        shift: tl.constexpr = 32 - ROW.value.bits * (part + 1)
        tile = narrowed(tl.reshape(element(units << shift, CODES) * scale, (PLACES, BLOCKS_PADDED * UNITS)), dtype)
    return tile


@triton.jit
def _plain_tile(cache_ptr, place, inside, ROW: tl.constexpr):
    WIDTH: tl.constexpr = ROW.value.width
    lane = tl.arange(0, _padded(ROW))[None, :]
    return tl.load(cache_ptr + place[:, None] * WIDTH + lane, mask=inside[:, None] & (lane < WIDTH), other=0.0)


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
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
):
    """A stretch of places for one text and key-value head."""
    pair, stretch = tl.program_id(0), tl.program_id(1)
    batch, head = (pair // kv_heads).to(tl.int64), (pair % kv_heads).to(tl.int64)
    keys_ptr += batch * keys_batch + head * keys_head
    values_ptr += batch * values_batch + head * values_head
    key_scales_ptr += batch * key_scales_batch + head * key_scales_head
    value_scales_ptr += batch * value_scales_batch + head * value_scales_head
    bias_ptr += batch * bias_batch
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    KEY_PARTS: tl.constexpr = _parts(KEY)
    VALUE_PARTS: tl.constexpr = _parts(VALUE)
    KEY_PADDED: tl.constexpr = _padded(KEY) // KEY_PARTS
    VALUE_PADDED: tl.constexpr = _padded(VALUE) // VALUE_PARTS
    member = tl.arange(0, GROUP_PADDED)
    row = pair.to(tl.int64) * GROUP + member
    channel = tl.arange(0, KEY_PADDED) * KEY_PARTS
    real = (member < GROUP)[None, :]
    at = row[None, :] * KEY.value.width + channel[:, None]
    here = real & (channel < KEY.value.width)[:, None]
    # Codes that share a byte or a halfword are those of channels next to each other: each has a part of its own.
    q0 = tl.load(q_ptr + at, mask=here, other=0.0)
    q1, q2, q3 = q0, q0, q0
    if KEY_PARTS > 1:
        q1 = tl.load(q_ptr + at + 1, mask=here, other=0.0)
    if KEY_PARTS > 2:
        q2 = tl.load(q_ptr + at + 2, mask=here, other=0.0)
        q3 = tl.load(q_ptr + at + 3, mask=here, other=0.0)
    filled = tl.minimum(tl.load(slots_ptr) + 1, room).to(tl.int32)
    share = tl.cdiv(tl.cdiv(filled, stretches), PLACES) * PLACES
    start = stretch * share
    end = tl.minimum(start + share, filled)
    largest = tl.full([GROUP_PADDED], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PADDED], tl.float32)
    o0 = tl.zeros([VALUE_PADDED, GROUP_PADDED], tl.float32)
    o1, o2, o3 = o0, o0, o0
    for begin in range(start, end, PLACES):
        place = begin + tl.arange(0, PLACES)
        inside = place < end
        if KEY.value.blocks == 0:
            scores = tl.dot(_plain_tile(keys_ptr, place, inside, KEY), q0, input_precision="ieee")
        else:
            codes = _codes_tile(keys_ptr, place, inside, KEY, PLACES)
            scales = _scales_tile(key_scales_ptr, place, inside, KEY)
            part = _element_tile(codes, scales, 0, KEY, PLACES, dtype)
            scores = tl.dot(part, q0, input_precision="ieee")
            if KEY_PARTS > 1:
                part = _element_tile(codes, scales, 1, KEY, PLACES, dtype)
                scores = tl.dot(part, q1, scores, input_precision="ieee")
            if KEY_PARTS > 2:
                part = _element_tile(codes, scales, 2, KEY, PLACES, dtype)
                scores = tl.dot(part, q2, scores, input_precision="ieee")
                part = _element_tile(codes, scales, 3, KEY, PLACES, dtype)
                scores = tl.dot(part, q3, scores, input_precision="ieee")
        seen = inside
        if HAS_BIAS:
            seen = seen & (tl.load(bias_ptr + place, mask=inside, other=0) != 0)
        scores *= scale
        if HAS_CAP:
            # tanh(x) = 1 - 2 / (exp(2x) + 1)
            scores = softcap - 2 * softcap / (tl.exp2(scores / softcap * (2 * _LOG2_E)) + 1)
        scores = tl.where(seen[:, None], scores * _LOG2_E, float("-inf"))
        peak = tl.maximum(largest, tl.max(scores, 0))
        # Nothing seen yet: any finite number keeps the differences defined.
        base = tl.where(peak == float("-inf"), 0.0, peak)
        shrink = tl.exp2(largest - base)
        p = tl.exp2(scores - base[None, :])
        total = total * shrink + tl.sum(p, 0)
        shrink = shrink[None, :]
        p = p.to(dtype)
        if VALUE.value.blocks == 0:
            part = _plain_tile(values_ptr, place, inside, VALUE)
            o0 = tl.dot(tl.trans(part), p, o0 * shrink, input_precision="ieee")
        else:
            codes = _codes_tile(values_ptr, place, inside, VALUE, PLACES)
            scales = _scales_tile(value_scales_ptr, place, inside, VALUE)
            part = _element_tile(codes, scales, 0, VALUE, PLACES, dtype)
            o0 = tl.dot(tl.trans(part), p, o0 * shrink, input_precision="ieee")
            if VALUE_PARTS > 1:
                part = _element_tile(codes, scales, 1, VALUE, PLACES, dtype)
                o1 = tl.dot(tl.trans(part), p, o1 * shrink, input_precision="ieee")
            if VALUE_PARTS > 2:
                part = _element_tile(codes, scales, 2, VALUE, PLACES, dtype)
                o2 = tl.dot(tl.trans(part), p, o2 * shrink, input_precision="ieee")
                part = _element_tile(codes, scales, 3, VALUE, PLACES, dtype)
                o3 = tl.dot(tl.trans(part), p, o3 * shrink, input_precision="ieee")
        largest = peak
    lane = tl.arange(0, VALUE_PADDED) * VALUE_PARTS
    out = (row[None, :] * stretches + stretch) * VALUE.value.width + lane[:, None]
    kept = real & (lane < VALUE.value.width)[:, None]
    tl.store(partial_ptr + out, o0, mask=kept)
    if VALUE_PARTS > 1:
        tl.store(partial_ptr + out + 1, o1, mask=kept)
    if VALUE_PARTS > 2:
        tl.store(partial_ptr + out + 2, o2, mask=kept)
        tl.store(partial_ptr + out + 3, o3, mask=kept)
    tl.store(largest_ptr + row * stretches + stretch, largest, mask=member < GROUP)
    tl.store(total_ptr + row * stretches + stretch, total, mask=member < GROUP)


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
):
    """One program a text, a query head and a few channels: the stretches' sums, each by its share of the softmax."""
    row = tl.program_id(0).to(tl.int64)
    stretch = tl.arange(0, STRETCHES)
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
