"""Rounding bfloat16 onto a grid two entries at a time, as they lie in a word: for few-bit elements, half the work.

All arithmetic is bfloat16's, and exact or rounded once where rounding is meant: an entry has 8 significant bits, a
number of the grid few, and so has what lies between them where both candidates of `mse` differ. Only the sum of
squared errors needs float32.

Importable only where `triton` is.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mxfx.ops.kernels.rounding_triton import _PACKS, block_scale, takes_lower

_SIGNS = tl.constexpr(0x8000_8000 - 2**32)
_MAGNITUDES = tl.constexpr(0x7FFF_7FFF)
_EXPONENTS = tl.constexpr(0x7F80_7F80)
_HIGH_HALF = tl.constexpr(-(2**16))
#: float32 has 16 more bits: beside so much less it is as coarse.
_COARSER = tl.constexpr(2.0**-16)


@triton.jit
def first_of(pair):
    """The entry in the low half of a word, float32."""
    return (pair << 16).to(tl.float32, bitcast=True)


@triton.jit
def second_of(pair):
    return (pair & _HIGH_HALF).to(tl.float32, bitcast=True)


@triton.jit
def twice(x):
    """float32 that bfloat16 holds, in both halves of a word; a constant as well."""
    bits = (tl.zeros([], tl.float32) + x).to(tl.int32, bitcast=True)
    return bits | ((bits >> 16) & 0xFFFF)


@triton.jit
def _nearest(x):
    """float32 rounded to bfloat16, by its bits: the interpreter would cut it off."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x == x, (bits + 0x7FFF + ((bits >> 16) & 1)) & _HIGH_HALF, _HIGH_HALF & 0x7FFF_FFFF)


@triton.jit
def _paired(first, second):
    return ((_nearest(first) >> 16) & 0xFFFF) | _nearest(second)


@triton.jit
def multiply_add(a, b, c):
    if _PACKS:
        pair = tl.inline_asm_elementwise(
            "fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        # A product is exact in float32, and the sum where its rounding matters.
        first = first_of(a) * first_of(b) + first_of(c)
        pair = _paired(first, second_of(a) * second_of(b) + second_of(c))
    return pair


@triton.jit
def add(a, b):
    return multiply_add(a, twice(1.0), b)


@triton.jit
def product(a, b):
    # Minus zero leaves a zero its sign.
    return multiply_add(a, b, tl.full([], _SIGNS, tl.int32))


@triton.jit
def larger(a, b):
    """NaN where either is."""
    if _PACKS:
        pair = tl.inline_asm_elementwise(
            "max.NaN.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        ALL: tl.constexpr = tl.PropagateNan.ALL
        second = tl.maximum(second_of(a), second_of(b), propagate_nan=ALL)
        pair = _paired(tl.maximum(first_of(a), first_of(b), propagate_nan=ALL), second)
    return pair


@triton.jit
def smaller(a, b):
    """Of numbers."""
    if _PACKS:
        pair = tl.inline_asm_elementwise(
            "min.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        pair = _paired(tl.minimum(first_of(a), first_of(b)), tl.minimum(second_of(a), second_of(b)))
    return pair


@triton.jit
def largest_of(pairs):
    """The largest magnitude of each line, float32."""
    pair = tl.reduce(pairs & _MAGNITUDES, 1, larger)
    return tl.maximum(first_of(pair), second_of(pair), propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _round_magnitudes(y, MIN_BINADE: tl.constexpr, MAGIC: tl.constexpr):
    spacing = product(larger(y & _EXPONENTS, twice(MIN_BINADE)), twice(MAGIC * _COARSER))
    return add(add(y, spacing), spacing ^ _SIGNS)


@triton.jit
def round_pairs(x, GRID: tl.constexpr):
    """`round_tile` of a tile of words (blocks, block / 2), a grid with `pairs`."""
    MAGIC: tl.constexpr = GRID.value.magic * _COARSER
    power, inverse, scale = block_scale(largest_of(x), GRID)
    inverse = twice(inverse)[:, None]
    if GRID.value.is_float:
        scaled = product(x & _MAGNITUDES, inverse)
        rounded = scaled
        if GRID.value.saturates:
            rounded = smaller(scaled, twice(GRID.value.high))
        rounded = _round_magnitudes(rounded, GRID.value.min_binade, GRID.value.magic)
    else:
        scaled = product(x, inverse)
        rounded = add(multiply_add(x, inverse, twice(MAGIC)), twice(-MAGIC))
        if GRID.value.saturates:
            rounded = smaller(rounded, twice(GRID.value.high))
    if GRID.value.mse:
        if GRID.value.is_float:
            lower = smaller(scaled, twice(GRID.value.high / 2))
            lower = _round_magnitudes(lower, GRID.value.min_binade / 2, GRID.value.magic)
        else:
            lower = add(multiply_add(x, inverse, twice(MAGIC / 2)), twice(-MAGIC / 2))
            lower = smaller(larger(lower, twice(GRID.value.low / 2)), twice(GRID.value.high / 2))
        gap = multiply_add(lower, twice(-1.0), rounded)
        lean = multiply_add(scaled, twice(-2.0), add(rounded, lower))
        total = tl.sum(first_of(gap) * first_of(lean) + second_of(gap) * second_of(lean), axis=1)
        rounded = tl.where(takes_lower(-total, power)[:, None], lower, rounded)
    if GRID.value.is_float:
        rounded |= x & _SIGNS
    return rounded, scale


@triton.jit
def pairs_to_e4m3(pairs, factor):
    """Times a power of two of each line, float32, as E4M3 bytes: two in an int16."""
    pairs = product(pairs, twice(factor)[:, None])
    if _PACKS:
        code = tl.inline_asm_elementwise(
            """{.reg .b32 first, second; shl.b32 first, $1, 16; and.b32 second, $1, 0xffff0000;
            cvt.rn.satfinite.e4m3x2.f32 $0, second, first;}""",
            "=h,r",
            [pairs],
            dtype=tl.int16,
            is_pure=True,
            pack=1,
        )
    else:
        low = first_of(pairs).to(tl.float8e4nv).to(tl.uint8, bitcast=True).to(tl.int32)
        high = second_of(pairs).to(tl.float8e4nv).to(tl.uint8, bitcast=True).to(tl.int32)
        code = (low | (high << 8)).to(tl.int16)
    return code
