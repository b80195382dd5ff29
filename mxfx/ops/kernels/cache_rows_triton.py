"""How rows of a KV cache lie in memory, and the kernel that writes a step's keys and values there, on their grids.

Importable only where `triton` is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxfx.algorithms.launch import on_device_of
from mxfx.formats import Format, IntElement, ScaleRule
from mxfx.formats.e8m0 import E8M0
from mxfx.ops.kernels.early_triton import starts_early, wait
from mxfx.ops.kernels.packed_triton import Codes, codes_of
from mxfx.ops.kernels.rounding_triton import _larger, _shared_scale, grid_of

_TWO_TO_127 = tl.constexpr(254 << 23)
_TWO_TO_MINUS_127 = tl.constexpr(1 << 22)
_EXPONENT = tl.constexpr(0x7F80_0000)
#: Keys, values, and their scales: what `cached_attend` writes.
Caches = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class Row:
    """How a row of a cache is stored: plain (`blocks` 0) or `blocks` of `block` codes; compile-time constants.

    `halfwords`: 4-bit integers that are read as bfloat16, four codes at a time. `offset` and `carry` give the least
    exponent at which nothing above zero saturates, the `_below` ones that below.
    """

    width: int
    blocks: int = 0
    block: int = 1
    bits: int = 16
    halfwords: bool = False
    codes: Codes | None = None
    offset: int = 0
    carry: int = 0
    offset_below: int = 0
    carry_below: int = 0

    @property
    def value(self) -> Row:
        """Itself: a kernel meets its constants wrapped, except in the interpreter."""
        return self


def takes(width: int, fmt: Format | None) -> bool:
    """Whether the kernels store and read rows of a format (None: plain)."""
    if fmt is None:
        return width <= 512
    block = fmt.block or 0
    # Two codes of a byte are two products, each of at least 16 channels.
    fits = fmt.bits == 8 or (fmt.bits == 4 and width > 16)
    return fits and width <= 512 and block >= 16 and block & (block - 1) == 0 and width % block == 0


@lru_cache(maxsize=256)
def row_of(width: int, fmt: Format | None) -> Row:
    """How rows of `width` elements are stored in a format; plain without one."""
    if fmt is None:
        return Row(width)
    assert fmt.block is not None
    above = grid_of(Format(fmt.element, fmt.block, E8M0(ScaleRule.RCEIL)), torch.float32)
    below = above
    if isinstance(fmt.element, IntElement):
        below = grid_of(Format(fmt.element, fmt.block, E8M0(ScaleRule.CEIL)), torch.float32)
    return Row(
        width,
        blocks=width // fmt.block,
        block=fmt.block,
        bits=fmt.bits,
        codes=codes_of(fmt),
        offset=above.offset,
        carry=above.carry,
        offset_below=below.offset,
        carry_below=below.carry,
    )


def write_tokens(
    caches: Caches, k: Tensor, v: Tensor, slots: Tensor, key_format: Format | None, value_format: Format | None
) -> None:
    """Put `k` and `v` (batch, kv_heads, seq, width), on their grids, at places `slots % room`; seq is at most room."""
    keys, values, key_scales, value_scales = caches
    batch, heads, seq = k.shape[:3]
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    ks, vs = (keys if key_scales is None else key_scales), (values if value_scales is None else value_scales)
    early = starts_early(k.device, batch * seq)
    with on_device_of(k):
        # Of the three axes of a launch the first alone has room for all tokens of a long text.
        _write_kernel[(seq, batch * heads, 2)](
            k, v, keys, values, ks, vs, slots, heads, keys.shape[2],
            *k.stride()[:3], *v.stride()[:3],
            *keys.stride()[:2], *values.stride()[:2], *ks.stride()[:2], *vs.stride()[:2],
            KEY=row_of(k.shape[-1], key_format), VALUE=row_of(v.shape[-1], value_format),
            EARLY=early, num_warps=1, launch_pdl=early,
        )  # fmt: skip


@triton.jit
def _write_row(x_ptr, cache_ptr, scales_ptr, place, ROW: tl.constexpr):
    """One row, at `place` of the (place, …) rows of one text and head."""
    WIDTH: tl.constexpr = ROW.value.width
    if ROW.value.blocks == 0:
        PADDED: tl.constexpr = triton.next_power_of_2(WIDTH)
        lane = tl.arange(0, PADDED)
        x = tl.load(x_ptr + lane, mask=lane < WIDTH)
        tl.store(cache_ptr + place * WIDTH + lane, x, mask=lane < WIDTH)
    else:
        BLOCKS: tl.constexpr = ROW.value.blocks
        BLOCK: tl.constexpr = ROW.value.block
        BLOCKS_PADDED: tl.constexpr = triton.next_power_of_2(BLOCKS)
        block = tl.arange(0, BLOCKS_PADDED)
        inside = (block < BLOCKS)[:, None]
        at = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if ROW.value.codes.mantissa < 0:
            above = tl.reduce(tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL), 1, _larger)
            below = tl.reduce(tl.maximum(-x, 0.0, propagate_nan=tl.PropagateNan.ALL), 1, _larger)
            largest = _larger(above, below)
            bits = tl.maximum(
                _shared_scale(above, ROW.value.offset, ROW.value.carry),
                _shared_scale(below, ROW.value.offset_below, ROW.value.carry_below),
            )
        else:
            largest = tl.reduce(tl.abs(x), 1, _larger)
            bits = _shared_scale(largest, ROW.value.offset, ROW.value.carry)
        finite = largest < float("inf")
        inverse = tl.maximum(_TWO_TO_127 - (bits & _EXPONENT), _TWO_TO_MINUS_127).to(tl.float32, bitcast=True)
        y = tl.where(finite[:, None], x * inverse[:, None], 0.0)
        if ROW.value.codes.mantissa < 0:
            code = y.to(tl.int32)
        else:
            # Scaled so that the biases agree, the element's bits are the top bits of the float.
            aligned = tl.abs(y) * (2.0 ** (ROW.value.codes.bias - 127))
            sign = (y.to(tl.int32, bitcast=True) >> 31) & (1 << (ROW.value.bits - 1))
            code = (aligned.to(tl.int32, bitcast=True) >> (23 - ROW.value.codes.mantissa)) | sign
        tl.store(
            scales_ptr + place * BLOCKS + block, tl.where(finite, bits >> 23, 255).to(tl.uint8), mask=block < BLOCKS
        )
        if ROW.value.bits == 4:
            low, high = tl.split(tl.reshape(code & 0xF, (BLOCKS_PADDED, BLOCK // 2, 2)))
            byte = block[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
            tl.store(cache_ptr + place * (WIDTH // 2) + byte, (low | (high << 4)).to(tl.uint8), mask=inside)
        else:
            tl.store(cache_ptr + place * WIDTH + at, (code & 0xFF).to(tl.uint8), mask=inside)


@triton.jit
def _write_kernel(
    k_ptr,
    v_ptr,
    keys_ptr,
    values_ptr,
    key_scales_ptr,
    value_scales_ptr,
    slots_ptr,
    heads,
    room,
    k_batch,
    k_head,
    k_token,
    v_batch,
    v_head,
    v_token,
    keys_batch,
    keys_head,
    values_batch,
    values_head,
    key_scales_batch,
    key_scales_head,
    value_scales_batch,
    value_scales_head,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program a token, a text and head, and keys or values."""
    wait(EARLY)
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    token = tl.program_id(0).to(tl.int64)
    place = tl.load(slots_ptr + token) % room
    if tl.program_id(2) == 0:
        _write_row(
            k_ptr + batch * k_batch + head * k_head + token * k_token,
            keys_ptr + batch * keys_batch + head * keys_head,
            key_scales_ptr + batch * key_scales_batch + head * key_scales_head,
            place,
            KEY,
        )
    else:
        _write_row(
            v_ptr + batch * v_batch + head * v_head + token * v_token,
            values_ptr + batch * values_batch + head * values_head,
            value_scales_ptr + batch * value_scales_batch + head * value_scales_head,
            place,
            VALUE,
        )
