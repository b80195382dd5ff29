"""A step of decoding on a GPU: attention that reads the codes of a cache as they are.

Attention is split over the length, so that a batch of one fills the device: each program takes a stretch of places for
one key-value head and all query heads that share it, each of its warps places of its own. A warp keeps a running
softmax (arXiv 2205.14135), a program joins those of its warps, and a second kernel, where there are several, joins the
stretches. How many places are filled is read on the device: a recorded graph serves every length.

Importable only where `triton` is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxfx.algorithms.launch import on_device_of
from mxfx.formats import Format
from mxfx.ops.kernels.cache_rows_triton import Caches
from mxfx.ops.kernels.cache_tiles_triton import (
    KEY_LANES,
    VALUE_LANES,
    key_channels,
    key_tile,
    loaded,
    offsets,
    powers,
    read_of,
    value_channels,
    value_tile,
)
from mxfx.ops.kernels.early_triton import starts_early, wait

#: Bytes of keys, and of values, that a warp meets at a time; no fewer than 32 places, and no more than 64.
TILE_BYTES = 2048
#: By whether the cache is packed: warps of a program, and warps that a device should have to do. Of an H200.
WARPS = {True: 1, False: 4}
TOGETHER = {True: 2112, False: 1056}
#: Bytes of a plain place beyond which, as in float32, tiles of several warps take more registers and memory than fit.
WIDE = 256
#: Channels of a row that one program joins.
JOINED = 16
_LOG2_E = tl.constexpr(1.4426950408889634)


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
    bytes_a_place = max(keys.shape[3] * keys.element_size(), values.shape[3] * values.element_size())
    wide = not packed and (bytes_a_place > WIDE or q.dtype == torch.float32)
    warps = 1 if wide else WARPS[packed]
    places = 64 if 64 * bytes_a_place <= TILE_BYTES else 32
    stretches = max(1, min(TOGETHER[packed] // (batch * kv_heads * warps), triton.cdiv(room, places * warps)))
    alone = stretches == 1
    key = read_of(q.shape[-1], key_format, KEY_LANES, q.dtype, places, warps)
    value = read_of(width, value_format, VALUE_LANES, q.dtype, places, warps)
    q = q.contiguous()
    out = torch.empty((batch, heads, 1, width), dtype=q.dtype, device=q.device)
    partial = sums = out
    if not alone:
        lines = value.products * value.channels
        partial = torch.empty((batch * heads, stretches, lines), dtype=torch.float32, device=q.device)
        sums = torch.empty((2, batch * heads, stretches), dtype=torch.float32, device=q.device)
    keys, ks = (keys, keys) if key_scales is None else (keys.view(torch.int16), key_scales)
    values, vs = (values, values) if value_scales is None else (values.view(torch.int16), value_scales)
    given = q if bias is None else bias.expand(batch, 1, 1, room)
    given = given if given.stride(3) == 1 else given.contiguous()
    sunk = q if sinks is None else sinks.contiguous()
    early = starts_early(q.device, batch)
    with on_device_of(q):
        _attend_kernel[(batch * kv_heads, stretches)](
            q, keys, values, ks, vs, given, slots, partial, sums[0], sums[-1], sunk,
            kv_heads, room, stretches, scale, 1.0 if softcap is None else softcap,
            *keys.stride()[:2], *values.stride()[:2], *ks.stride()[:2], *vs.stride()[:2],
            0 if bias is None else given.stride(0),
            KEY=key, VALUE=value, GROUP=group, GROUP_PADDED=max(8, triton.next_power_of_2(group)),
            HAS_BIAS=bias is not None, HAS_CAP=softcap is not None, HAS_SINKS=sinks is not None,
            ALONE=alone, EARLY=early, num_warps=warps, num_stages=1 if packed else 2, launch_pdl=early,
        )  # fmt: skip
        if not alone:
            _join_kernel[(batch * heads, lines // JOINED)](
                partial, sums[0], sums[1], out, sunk, stretches, heads, HAS_SINKS=sinks is not None,
                VALUE=value, LANES=JOINED, STRETCHES=triton.next_power_of_2(stretches),
                EARLY=early, num_warps=4, launch_pdl=early,
            )  # fmt: skip
    return out


@triton.jit
def _query(q_ptr, row, real, number: tl.constexpr, KEY: tl.constexpr, GROUP: tl.constexpr):
    """The right operand of product `number`, (warps, channels, query heads)."""
    WARPS: tl.constexpr = KEY.value.warps
    CHANNELS: tl.constexpr = KEY.value.channels
    channel = key_channels(number, KEY)
    at = row[None, :] * KEY.value.row.width + channel[:, None]
    q = tl.load(q_ptr + at, mask=real[None, :] & (channel < KEY.value.row.width)[:, None], other=0.0)
    return tl.broadcast_to(q[None], (WARPS, CHANNELS, GROUP))


@triton.jit
def _met(
    keys, key_scales, values, value_scales, bias_ptr, begin, end, q0, q1, q2, q3,
    largest, total, o0, o1, o2, o3, scale, softcap,
    KEY: tl.constexpr, VALUE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    """The running softmax and its sums, with what was loaded of the places from `begin` on."""
    dtype: tl.constexpr = q0.dtype
    if KEY.value.plain:
        scores = tl.dot(keys, q0, input_precision="ieee")
    else:
        of_keys = powers(key_scales, KEY)
        scores = tl.dot(key_tile(keys, of_keys, 0, KEY, dtype), q0, input_precision="ieee")
        if KEY.value.products > 1:
            scores = tl.dot(key_tile(keys, of_keys, 1, KEY, dtype), q1, scores, input_precision="ieee")
        if KEY.value.products > 2:
            scores = tl.dot(key_tile(keys, of_keys, 2, KEY, dtype), q2, scores, input_precision="ieee")
            scores = tl.dot(key_tile(keys, of_keys, 3, KEY, dtype), q3, scores, input_precision="ieee")
    place = begin + offsets(KEY)
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
    if VALUE.value.plain:
        o0 = tl.dot(tl.permute(values, (0, 2, 1)), p, o0 * shrink, input_precision="ieee")
    else:
        of_values = powers(value_scales, VALUE)
        o0 = tl.dot(value_tile(values, of_values, 0, VALUE, dtype), p, o0 * shrink, input_precision="ieee")
        if VALUE.value.products > 1:
            o1 = tl.dot(value_tile(values, of_values, 1, VALUE, dtype), p, o1 * shrink, input_precision="ieee")
        if VALUE.value.products > 2:
            o2 = tl.dot(value_tile(values, of_values, 2, VALUE, dtype), p, o2 * shrink, input_precision="ieee")
            o3 = tl.dot(value_tile(values, of_values, 3, VALUE, dtype), p, o3 * shrink, input_precision="ieee")
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
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    ALONE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """A stretch of places for one text and key-value head; `ALONE`: it is the only one, and its sums are the result."""
    wait(EARLY)
    pair, stretch = tl.program_id(0), tl.program_id(1)
    batch, head = (pair // kv_heads).to(tl.int64), (pair % kv_heads).to(tl.int64)
    keys_ptr += batch * keys_batch + head * keys_head
    values_ptr += batch * values_batch + head * values_head
    key_scales_ptr += batch * key_scales_batch + head * key_scales_head
    value_scales_ptr += batch * value_scales_batch + head * value_scales_head
    bias_ptr += batch * bias_batch
    TILE: tl.constexpr = KEY.value.places * KEY.value.warps
    WARPS: tl.constexpr = KEY.value.warps
    CHANNELS: tl.constexpr = VALUE.value.channels
    member = tl.arange(0, GROUP_PADDED)
    row = pair.to(tl.int64) * GROUP + member
    real = member < GROUP
    # Codes that share a halfword are those of channels next to each other: each has a product of its own.
    q0 = _query(q_ptr, row, real, 0, KEY, GROUP_PADDED)
    q1, q2, q3 = q0, q0, q0
    if KEY.value.products > 1:
        q1 = _query(q_ptr, row, real, 1, KEY, GROUP_PADDED)
    if KEY.value.products > 2:
        q2 = _query(q_ptr, row, real, 2, KEY, GROUP_PADDED)
        q3 = _query(q_ptr, row, real, 3, KEY, GROUP_PADDED)
    filled = tl.minimum(tl.load(slots_ptr) + 1, room).to(tl.int32)
    share = tl.cdiv(tl.cdiv(filled, TILE), stretches) * TILE
    start = stretch * share
    end = tl.minimum(start + share, filled)
    whole = start + (end - start) // TILE * TILE
    largest = tl.full([WARPS, GROUP_PADDED], float("-inf"), tl.float32)
    total = tl.zeros([WARPS, GROUP_PADDED], tl.float32)
    o0 = tl.zeros([WARPS, CHANNELS, GROUP_PADDED], tl.float32)
    o1, o2, o3 = o0, o0, o0
    for begin in range(start, whole, TILE):
        keys, key_scales = loaded(keys_ptr, key_scales_ptr, begin, end, KEY, True)
        values, value_scales = loaded(values_ptr, value_scales_ptr, begin, end, VALUE, True)
        largest, total, o0, o1, o2, o3 = _met(
            keys, key_scales, values, value_scales, bias_ptr, begin, end, q0, q1, q2, q3,
            largest, total, o0, o1, o2, o3, scale, softcap, KEY, VALUE, HAS_BIAS, HAS_CAP,
        )  # fmt: skip
    if whole < end:
        keys, key_scales = loaded(keys_ptr, key_scales_ptr, whole, end, KEY, False)
        values, value_scales = loaded(values_ptr, value_scales_ptr, whole, end, VALUE, False)
        largest, total, o0, o1, o2, o3 = _met(
            keys, key_scales, values, value_scales, bias_ptr, whole, end, q0, q1, q2, q3,
            largest, total, o0, o1, o2, o3, scale, softcap, KEY, VALUE, HAS_BIAS, HAS_CAP,
        )  # fmt: skip
    # The warps' sums, each by its share of the softmax.
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
    else:
        tl.store(largest_ptr + row * stretches + stretch, peak, mask=real)
        tl.store(total_ptr + row * stretches + stretch, total, mask=real)
    shrink = shrink[:, None, :]
    _put(partial_ptr, o0 * shrink, row, stretch, stretches, real, 0, VALUE, ALONE)
    if VALUE.value.products > 1:
        _put(partial_ptr, o1 * shrink, row, stretch, stretches, real, 1, VALUE, ALONE)
    if VALUE.value.products > 2:
        _put(partial_ptr, o2 * shrink, row, stretch, stretches, real, 2, VALUE, ALONE)
        _put(partial_ptr, o3 * shrink, row, stretch, stretches, real, 3, VALUE, ALONE)


@triton.jit
def _put(
    out_ptr, sums, row, stretch, stretches, real, number: tl.constexpr, VALUE: tl.constexpr, ALONE: tl.constexpr
):  # fmt: skip
    """One product's sums: to their channels, or, to be joined, side by side."""
    line = number * VALUE.value.channels + tl.arange(0, VALUE.value.channels)
    sums = tl.sum(sums, 0).to(out_ptr.dtype.element_ty)
    if ALONE:
        channel = value_channels(line, VALUE)[:, None]
        at = row[None, :] * VALUE.value.row.width + channel
        tl.store(out_ptr + at, sums, mask=real[None, :] & (channel < VALUE.value.row.width))
    else:
        LINES: tl.constexpr = VALUE.value.products * VALUE.value.channels
        tl.store(out_ptr + (row * stretches + stretch)[None, :] * LINES + line[:, None], sums, mask=real[None, :])


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
    VALUE: tl.constexpr,
    LANES: tl.constexpr,
    STRETCHES: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program a text, a query head and a few channels: the stretches' sums, each by its share of the softmax."""
    wait(EARLY)
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
    at = (row * stretches + stretch[:, None]) * (VALUE.value.products * VALUE.value.channels) + lane[None, :]
    parts = tl.load(partial_ptr + at, mask=here[:, None], other=0.0)
    joined = (tl.sum(parts * share[:, None], 0) / whole).to(out_ptr.dtype.element_ty)
    channel = value_channels(lane, VALUE)
    tl.store(out_ptr + row * VALUE.value.row.width + channel, joined, mask=channel < VALUE.value.row.width)
