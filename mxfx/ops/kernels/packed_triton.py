"""Packed weights on a GPU: expanded for a GEMM, or multiplied as they are with a few rows.

Any codes of 2 to 8 bits expand; those of 4 and 8, of which a byte holds two or one, also meet few rows as they lie.
Every value that a kernel makes of a code and its scale is exact in the dtype that it is made in.

Importable only where `triton` is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxfx.algorithms.launch import KEPT_SHAPES, Launch
from mxfx.formats import FloatElement, Format
from mxfx.formats.stored import codes_length
from mxfx.ops.fp8 import headroom

_NAN = tl.constexpr(0x7FC0_0000)
_SIGN = tl.constexpr(-(2**31))
_HIGH_HALF = tl.constexpr(-(2**16))
#: Bytes of what is read at once of codes and rows.
WORD = 4
#: Entries that a program expands at a time.
EXPANDED = 4096
#: By how many output channels there are at least: how many one multiplies at a time, and words of codes. Of an H200.
CHANNELS_TOGETHER = ((8192, 8, 256), (2048, 4, 256), (0, 2, 512))
ROW_WARPS = 2


@dataclass(frozen=True)
class Codes:
    """What the kernels know of an element type: `mantissa` and `bias` of a float (-1 and 0 for an integer).

    `top`: their `mxfx.ops.fp8.headroom`.
    """

    bits: int
    mantissa: int
    bias: int
    top: int

    @property
    def value(self) -> Codes:
        """Itself: a kernel meets its constants wrapped, except in the interpreter."""
        return self


@lru_cache(maxsize=64)
def codes_of(fmt: Format) -> Codes:
    element = fmt.element
    if isinstance(element, FloatElement):
        return Codes(fmt.bits, element.mantissa_bits, element.bias, headroom(fmt))
    return Codes(fmt.bits, -1, 0, headroom(fmt))


def expand(codes: Tensor, scales: Tensor, fmt: Format, out: Tensor) -> None:
    """Write the decoded weight (n, k) to `out` (n, k), bfloat16, float16 or float32, contiguous."""
    _launch_expand(codes.shape[0], out.shape[1], out.dtype, codes.device, fmt)(codes, scales, out, out)


def expand_to_e4m3(codes: Tensor, scales: Tensor, fmt: Format, payload: Tensor, row_scales: Tensor) -> None:
    """Write the weight as E4M3 bytes, `payload` uint8 (n, k), and the power of two of each row, float32 (n,).

    Exact where the row's blocks span few enough octaves (`mxfx.ops.fp8.octaves_beyond`).
    """
    _launch_expand(codes.shape[0], payload.shape[1], torch.uint8, codes.device, fmt)(codes, scales, payload, row_scales)


@lru_cache(maxsize=KEPT_SHAPES)
def _launch_expand(rows: int, width: int, dtype: torch.dtype, device: torch.device, fmt: Format) -> Launch:
    assert fmt.block is not None
    per_row = triton.cdiv(width, fmt.block)
    return Launch(
        _expand_kernel,
        lambda at_a_time: rows,
        (width, per_row, codes_length(width, fmt)),
        {
            "BLOCKS": min(triton.next_power_of_2(per_row), max(EXPANDED // fmt.block, 1)),
            "BLOCK": fmt.block,
            "PADDED": triton.next_power_of_2(per_row),
            "CODES": codes_of(fmt),
        },
        num_warps=4,
    )


@triton.jit
def element(code, CODES: tl.constexpr):
    """The value of a code whose highest bit is bit 31 of int32 `code`, float32."""
    if CODES.value.mantissa < 0:
        value = (code >> (32 - CODES.value.bits)).to(tl.float32)
    else:
        aligned = (code & 0x7FFF_FFFF) >> (31 - (CODES.value.bits - 1))
        magnitude = (aligned << (23 - CODES.value.mantissa)).to(tl.float32, bitcast=True)
        value = magnitude * (2.0 ** (127 - CODES.value.bias))
        value = (value.to(tl.int32, bitcast=True) | (code & _SIGN)).to(tl.float32, bitcast=True)  # -0 stays
    return value


@triton.jit
def power(biased):
    """2^(biased - 127) as float32 for an E8M0 byte; NaN for 255."""
    bits = tl.maximum(biased << 23, 1 << 22)
    return tl.where(biased == 255, _NAN, bits).to(tl.float32, bitcast=True)


@triton.jit
def to_e4m3(x):
    """E4M3 bytes of `x`, |x| at most 448, to nearest, ties to even; one instruction for two of them since Ada."""
    return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)


@triton.jit
def of_e4m3(code):
    """float32 of E4M3 bits, the low byte of an integer."""
    wide = code.to(tl.int32)
    magnitude = ((wide & 0x7F) << 20).to(tl.float32, bitcast=True) * (2.0**120)
    value = (magnitude.to(tl.int32, bitcast=True) | ((wide & 0x80) << 24)).to(tl.float32, bitcast=True)
    return tl.where((wide & 0x7F) == 0x7F, float("nan"), value)


@triton.jit
def narrowed(x, dtype: tl.constexpr):
    """float32 that `dtype` holds exactly, or nearly, as `dtype`; a bfloat16 is the upper half of its bits."""
    if dtype == tl.bfloat16:
        narrow = (x.to(tl.int32, bitcast=True) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        narrow = x.to(dtype)
    return narrow


@triton.jit
def _expand_kernel(
    codes_ptr,
    scales_ptr,
    out_ptr,
    row_scales_ptr,
    width,
    per_row,
    bytes_a_row,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    PADDED: tl.constexpr,
    CODES: tl.constexpr,
):
    """One program, one row."""
    row = tl.program_id(0).to(tl.int64)
    codes_ptr += row * bytes_a_row
    BITS: tl.constexpr = CODES.value.bits
    kind = out_ptr.dtype.element_ty
    lowest = 0
    if kind == tl.uint8:
        every = tl.arange(0, PADDED)
        powers = tl.load(scales_ptr + row * per_row + every, mask=every < per_row, other=0).to(tl.int32)
        highest = tl.max(tl.where(powers == 255, 0, powers), axis=0)
        # The row's scale is a normal number.
        lowest = tl.maximum(highest - CODES.value.top, 1)
        of_row = tl.where(tl.max(powers, axis=0) == 255, _NAN, lowest << 23)
        tl.store(row_scales_ptr + row, of_row.to(tl.float32, bitcast=True))
    block = tl.arange(0, BLOCKS)
    for start in range(0, per_row, BLOCKS):
        inside = (start + block) < per_row
        here = inside[:, None]
        scale = tl.load(scales_ptr + row * per_row + start + block, mask=inside, other=0).to(tl.int32)
        if kind == tl.uint8:
            # Below 2^-126 nothing is left in E4M3 anyway.
            away = tl.maximum(scale - lowest + 127, 1)
            factor = tl.where(scale == 255, _NAN, away << 23).to(tl.float32, bitcast=True)
        else:
            factor = power(scale)
        column = (start + block)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        if BITS == 4:
            byte = (start + block)[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
            code = tl.load(codes_ptr + byte, mask=here, other=0).to(tl.int32)
            values = tl.join(code_at(code, 0, CODES), code_at(code, 1, CODES))
            values = tl.reshape(values, (BLOCKS, BLOCK))
        else:
            byte = column * BITS // 8
            code = tl.load(codes_ptr + byte, mask=here, other=0).to(tl.int32)
            if BITS < 8:
                beyond = tl.load(codes_ptr + byte + 1, mask=here & (byte + 1 < bytes_a_row), other=0).to(tl.int32)
                code = (code | (beyond << 8)) >> (column * BITS % 8)
            values = element(code << (32 - BITS), CODES)
        values *= factor[:, None]
        if kind == tl.uint8:
            tl.store(out_ptr + row * width + column, to_e4m3(values), mask=here)
        else:
            tl.store(out_ptr + row * width + column, values.to(kind), mask=here)


def multiply_rows(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    fmt: Format,
    out: Tensor,
    row_scales: Tensor | None = None,
) -> None:
    """Write `linear(x, w, bias)` of few rows to `out` (m, n), any row stride; x (m, k), contiguous. Sums in float32.

    x is of `out`'s dtype, or E4M3 bytes with `row_scales`, a power of two a row.
    """
    rows, width = x.shape
    launch = _launch_rows(rows, width, codes.shape[0], out.stride(0), x.dtype, x.device, bias is not None, fmt)
    if x.dtype in (torch.bfloat16, torch.uint8):
        # One row of a wider tensor may begin within a word.
        x = (x.clone() if x.data_ptr() % WORD else x).view(torch.int32)
    launch(
        x,
        x if row_scales is None else row_scales,
        codes.view(torch.int32),
        scales,
        out if bias is None else bias,
        out,
    )


@lru_cache(maxsize=KEPT_SHAPES)
def _launch_rows(
    rows: int,
    width: int,
    channels: int,
    out_stride: int,
    dtype: torch.dtype,
    device: torch.device,
    bias: bool,
    fmt: Format,
) -> Launch:
    assert fmt.block is not None
    per_row, words = width // fmt.block, fmt.block * fmt.bits // 32
    together, at_a_time = next(found for least, *found in CHANNELS_TOGETHER if channels >= least)
    return Launch(
        _few_rows_kernel,
        lambda _: triton.cdiv(channels, together) * rows,
        (rows, channels, per_row, out_stride, 1),
        {
            "CHANNELS": together,
            "BLOCKS": min(triton.next_power_of_2(per_row), max(at_a_time // words, 1)),
            "WORDS": words,
            "PERWORD": 32 // fmt.bits,
            "X": {torch.bfloat16: "bf16", torch.uint8: "e4m3"}.get(dtype, "plain"),
            "BIAS": bias,
            "CODES": codes_of(fmt),
        },
        num_warps=ROW_WARPS,
    )


@triton.jit(do_not_specialize=["one"])
def _few_rows_kernel(
    x_ptr,
    row_scales_ptr,
    codes_ptr,
    scales_ptr,
    bias_ptr,
    y_ptr,
    rows,
    channels,
    per_row,
    out_stride,
    one,
    CHANNELS: tl.constexpr,
    BLOCKS: tl.constexpr,
    WORDS: tl.constexpr,
    PERWORD: tl.constexpr,
    X: tl.constexpr,
    BIAS: tl.constexpr,
    CODES: tl.constexpr,
):
    """One program, one row and `CHANNELS` results: each lane keeps a sum of its own until the end.

    A word is 32 bits of codes; neighbours take the other rows of the same weights, which are in the cache by then.
    `one` is 1, which the compiler must not know: it would read neighbouring words at once, and lay them out
    so that activations would have to cross shared memory to meet them.
    """
    row = tl.program_id(0) % rows
    channel = tl.program_id(0) // rows * CHANNELS + tl.arange(0, CHANNELS)
    real = channel < channels
    line = channel.to(tl.int64) * per_row
    block = tl.arange(0, BLOCKS) * one
    lane = tl.arange(0, WORDS) * one
    PER_LOAD: tl.constexpr = 4 if X == "e4m3" else 2 if X == "bf16" else 1
    x_ptr += row * (per_row * WORDS * (PERWORD // PER_LOAD))
    total = tl.zeros((BLOCKS, WORDS, CHANNELS), tl.float32)
    for start in range(0, per_row, BLOCKS):
        inside = (start + block) < per_row
        mask = inside[:, None] & real[None, :]
        there = (start + block)[:, None] + line[None, :]
        scale = power(tl.load(scales_ptr + there, mask=mask, other=0).to(tl.int32))
        word = tl.load(codes_ptr + there[:, None, :] * WORDS + lane[None, :, None], mask=mask[:, None, :], other=0)
        x_at = x_ptr + ((start + block)[:, None] * WORDS + lane[None, :]) * (PERWORD // PER_LOAD)
        part = tl.zeros((BLOCKS, WORDS, CHANNELS), tl.float32)
        for turn in tl.static_range(PERWORD // PER_LOAD):
            loaded = tl.load(x_at + turn, mask=inside[:, None], other=0)
            for i in tl.static_range(PER_LOAD):
                part += code_at(word, turn * PER_LOAD + i, CODES) * entry(loaded, i, X)[:, :, None]
        total += part * scale[:, None, :]
    y = tl.sum(tl.sum(total, axis=1), axis=0)
    if X == "e4m3":
        y *= tl.load(row_scales_ptr + row)
    if BIAS:
        y += tl.load(bias_ptr + channel, mask=real, other=0.0).to(tl.float32)
    tl.store(y_ptr + row.to(tl.int64) * out_stride + channel, y.to(y_ptr.dtype.element_ty), mask=real)


@triton.jit
def entry(loaded, i: tl.constexpr, X: tl.constexpr):
    """Entry `i` of what was loaded of an activation, float32: two bfloat16 or four E4M3 numbers of a word."""
    if X == "bf16":
        bits = (loaded << 16) if i == 0 else (loaded & _HIGH_HALF)
        x = bits.to(tl.float32, bitcast=True)
    elif X == "e4m3":
        x = of_e4m3(loaded >> (8 * i))
    else:
        x = loaded.to(tl.float32)
    return x


@triton.jit
def code_at(word, i: tl.constexpr, CODES: tl.constexpr):
    """The value of code `i` of a word, float32."""
    BITS: tl.constexpr = CODES.value.bits
    if CODES.value.mantissa < 0:
        # Beside 2^23 the unit in the last place is 1: the code, its sign bit turned over, as a mantissa.
        HALF: tl.constexpr = 2 ** (BITS - 1)
        mantissa = ((word >> (BITS * i)) & (2**BITS - 1)) ^ (0x4B00_0000 | HALF)
        value = mantissa.to(tl.float32, bitcast=True) - (8388608.0 + HALF)
    else:
        value = element(word << (32 - BITS * (i + 1)), CODES)
    return value
