"""Rounding a tile of blocks onto a format's grid, in registers: what every quantizing kernel ends with.

The arithmetic is that of `mxfx.formats`, operation by operation, and every operation is exact or correctly
rounded (powers of two by their bits, rounding by adding and subtracting 1.5·2^p), so a contraction into FMA
changes nothing and the result equals the CPU's bit for bit.

Importable only where `triton` is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl

from mxfx.formats import FloatElement, Format, IntElement, ScaleRule
from mxfx.formats.e8m0 import error_bits
from mxfx.formats.element import Element
from mxfx.formats.format import precisions

_FLOAT32_MANTISSA = 23

_SIGN = tl.constexpr(-(2**31))
_EXPONENT = tl.constexpr(0x7F80_0000)
_SMALLEST_NORMAL = tl.constexpr(0x0080_0000)
_TWO_TO_64 = tl.constexpr(2.0**64)
# Powers of two by their bits; the least is subnormal.
_TWO_TO_127 = tl.constexpr(254 << 23)
_TWO_TO_MINUS_127 = tl.constexpr(1 << 22)
_NAN = tl.constexpr(0x7FC0_0000)


@dataclass(frozen=True)
class Grid:
    """What the kernels know of a format at compile time.

    `low`, `high`: the least and the greatest element. `min_binade`: the binade of the smallest normal element.
    `magic`: times a binade (1 for integers), a number beside which float32 is as coarse as the element.
    `offset`, `carry`: the shared exponent is that of amax, its bits plus `carry`, less `offset`.
    `saturates`: whether a block's largest may exceed `high` under the exponent that the rule gives it.
    `overflow`: which results may exceed the dtype's `largest`: none, "low" or "both".
    `held`: whether the dtype holds every number of the grid, but the too large; float16 has too few exponents.
    `pairs`: whether `round_pairs` takes it: bfloat16 has the bits for it, and all its exponents.
    `sum`: how squared errors of `mse` are compared: 0 in float32 and 1 in int32, where either holds every partial
    sum exactly; 2 and 3 in 64-bit fixed point (one float32 factor, two float64 factors), in fractions `unit`.
    """

    low: float
    high: float
    min_binade: float
    magic: float
    offset: int
    carry: int
    saturates: bool
    overflow: str
    largest: float
    is_float: bool
    held: bool
    pairs: bool
    mse: bool
    sum: int
    unit: float

    @property
    def value(self) -> Grid:
        """Itself: a kernel meets its constants wrapped, `GRID.value`, except in the interpreter."""
        return self


@lru_cache(maxsize=512)
def grid_of(fmt: Format, dtype: torch.dtype) -> Grid:
    """The grid of a format for input of `dtype` (bfloat16, float16 or float32)."""
    element = fmt.element
    integer = isinstance(element, IntElement)
    if isinstance(element, IntElement):
        low, min_binade, magic = element.min_value, 1.0, 1.5 * 2.0**_FLOAT32_MANTISSA
    else:
        assert isinstance(element, FloatElement)
        low, min_binade = -element.max_value, 2.0**element.min_exponent
        magic = 1.5 * 2.0 ** (_FLOAT32_MANTISSA - element.mantissa_bits)
    kind, unit = _sum_of_errors(fmt, dtype)
    return Grid(
        low=low,
        high=element.max_value,
        min_binade=min_binade,
        magic=magic,
        offset=element.max_exponent + int(integer and fmt.rule is ScaleRule.CEIL),
        carry=_carry(fmt),
        saturates=fmt.rule not in (ScaleRule.RCEIL, ScaleRule.MSE) or element.max_exponent < 1,
        overflow=_overflow(fmt),
        largest=torch.finfo(dtype).max,
        is_float=not integer,
        held=_holds(dtype, element),
        pairs=dtype == torch.bfloat16 and _holds(dtype, element) and kind == 0 and element.max_value < 64,
        mse=fmt.rule is ScaleRule.MSE,
        sum=kind,
        unit=unit,
    )


def _holds(dtype: torch.dtype, element: Element) -> bool:
    """Whether no entry of a block is rounded once more, whatever the block's scale."""
    exponents = element.min_exponent - element.mantissa_bits if isinstance(element, FloatElement) else 0
    # Of the least scale, 2^-127, in units of the least number.
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    return dtype != torch.float16 and 2.0 ** (exponents - 127) >= least


def _carry(fmt: Format) -> int:
    """What to add to the bits of amax so that they reach the next exponent where the rule says so."""
    one = 2**_FLOAT32_MANTISSA
    match fmt.rule:
        case ScaleRule.RCEIL | ScaleRule.MSE:
            return one - 1 - int((2 * math.frexp(fmt.element.max_value)[0] - 1) * one)
        case ScaleRule.EVEN:
            return one >> (fmt.element.mantissa_bits + 1)
        case ScaleRule.CEIL:
            return one - 1
    return 0


def _overflow(fmt: Format) -> str:
    if fmt.block is None or fmt.rule in (ScaleRule.RCEIL, ScaleRule.EVEN, ScaleRule.MSE):
        return "both"
    if isinstance(fmt.element, IntElement):
        return "low"  # only the code that has no opposite is beyond amax
    return "both" if fmt.rule is ScaleRule.CEIL else "none"


def _sum_of_errors(fmt: Format, dtype: torch.dtype) -> tuple[int, float]:
    """How to sum differences of squared errors so that no rounding can change the sign of the sum."""
    if fmt.rule is not ScaleRule.MSE or fmt.block is None:
        return 0, 1.0
    precision = precisions()[dtype]
    bits, smallest = error_bits(fmt.element, fmt.block, precision)
    if precision < 24 and bits <= 24:
        return 0, 1.0
    if precision < 24 and bits <= 31:
        return 1, 1 / smallest
    return (2 if precision < 24 else 3), fixed_point_unit(fmt)


def fixed_point_unit(fmt: Format) -> float:
    """Fractions of a unit in which differences of squared errors are counted in 64 bits, as `Format` does."""
    assert fmt.block is not None
    bound = 2 * fmt.element.max_exponent + 1
    return 2.0 ** (62 - bound - math.ceil(math.log2(fmt.block)))


@triton.jit
def as_stored(x, dtype: tl.constexpr):
    """float32 `x` rounded to `dtype`, as float32."""
    if dtype == tl.float32:
        rounded = x
    elif _PACKS and dtype == tl.bfloat16:
        # Alone, a conversion takes a slow unit, four times as long as all else about an element.
        rounded = tl.inline_asm_elementwise(
            """{.reg .b32 pair; cvt.rn.bf16x2.f32 pair, $3, $2; shl.b32 $0, pair, 16; and.b32 $1, pair, 0xffff0000;}""",
            "=r,=r,r,r",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )
    else:
        rounded = x.to(dtype).to(tl.float32)
    return rounded


@triton.jit
def narrowed(x, dtype: tl.constexpr):
    """float32 `x` as `dtype`."""
    if _PACKS and dtype == tl.bfloat16:
        narrow = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    else:
        narrow = x.to(dtype)
    return narrow


@triton.jit
def round_to_element(y, GRID: tl.constexpr):
    """Nearest element, ties to even, saturating, NaN kept; a float element keeps -0, an integer has none."""
    if GRID.value.is_float:
        magnitude = tl.minimum(tl.abs(y), GRID.value.high, propagate_nan=tl.PropagateNan.ALL)
        rounded = _with_sign(_round_magnitude(magnitude, GRID.value.min_binade, GRID.value.magic), y)
    else:
        rounded = (y + GRID.value.magic) - GRID.value.magic
        rounded = tl.maximum(rounded, GRID.value.low, propagate_nan=tl.PropagateNan.ALL)
        rounded = tl.minimum(rounded, GRID.value.high, propagate_nan=tl.PropagateNan.ALL)
    return rounded


@triton.jit
def _round_magnitude(y, MIN_BINADE: tl.constexpr, MAGIC: tl.constexpr):
    binade = (y.to(tl.int32, bitcast=True) & _EXPONENT).to(tl.float32, bitcast=True)
    spacing = tl.maximum(binade, MIN_BINADE) * MAGIC
    return (y + spacing) - spacing


@triton.jit
def _with_sign(magnitude, y):
    sign = y.to(tl.int32, bitcast=True) & _SIGN
    return (magnitude.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


#: Whether NVIDIA's instructions can be given by name: not in the interpreter, not on other GPUs.
_PACKS = tl.constexpr(isinstance(_larger, triton.JITFunction) and torch.version.hip is None)
_SATURATE = """{{.reg .b32 most, least; mov.b32 most, 0x{0}{0}; mov.b32 least, 0x{1}{1};
cvt.rn.{2}x2.f32 $0, $2, $1; min.NaN.{2}x2 $0, $0, most; max.NaN.{2}x2 $0, $0, least;}}"""
_SATURATE_BF16 = tl.constexpr(_SATURATE.format("7f7f", "ff7f", "bf16"))
_SATURATE_FP16 = tl.constexpr(_SATURATE.format("7bff", "fbff", "f16"))


@triton.jit
def _shared_scale(largest, OFFSET: tl.constexpr, CARRY: tl.constexpr):
    """Bits of 2^e, where e is the exponent, in [-127, 127], of a block whose largest |x| is given."""
    bits = largest.to(tl.int32, bitcast=True)
    shift = OFFSET << 23
    if CARRY > 0 and OFFSET < 1:
        # Only here does the mantissa of a subnormal number count.
        tiny = bits < _SMALLEST_NORMAL
        bits = tl.where(tiny, (largest * _TWO_TO_64).to(tl.int32, bitcast=True), bits)
        shift = tl.where(tiny, 64 << 23, 0)
    power = tl.minimum(((bits + CARRY) & _EXPONENT) - shift, _TWO_TO_127)
    return tl.maximum(power, _TWO_TO_MINUS_127)


@triton.jit
def block_scale(largest, GRID: tl.constexpr):
    """Of a block with this largest |x|: the bits of its scale, the scale's inverse, the scale, or NaN if not finite."""
    power = _shared_scale(largest, GRID.value.offset, GRID.value.carry)
    inverse = tl.maximum(_TWO_TO_127 - (power & _EXPONENT), _TWO_TO_MINUS_127).to(tl.float32, bitcast=True)
    # A block that is not finite meets this at the end, whatever was computed of it.
    return power, inverse, tl.where(largest < float("inf"), power, _NAN).to(tl.float32, bitcast=True)


@triton.jit
def takes_lower(error, power):
    """Whether a block takes the exponent below, whose squared error is larger by `error`."""
    return (error < 0) & (power > _TWO_TO_MINUS_127)


@triton.jit
def quantize_tile(x, GRID: tl.constexpr, dtype: tl.constexpr):
    """Rows of a float32 tile (blocks, block), each one block, lanes outside it zero; on the grid, of `dtype`."""
    rounded, scale = round_tile(x, GRID)
    return saturated(rounded * scale[:, None], dtype, GRID)


@triton.jit
def round_tile(x, GRID: tl.constexpr):
    """`quantize_tile` in units of each block's scale, and the scales, NaN where a block is not finite; float32."""
    power, inverse, scale = block_scale(tl.reduce(tl.abs(x), 1, _larger), GRID)
    scaled = x * inverse[:, None]
    if GRID.value.is_float:
        scaled = tl.abs(scaled)
        rounded = scaled
        if GRID.value.saturates:
            rounded = tl.minimum(scaled, GRID.value.high)
        rounded = _round_magnitude(rounded, GRID.value.min_binade, GRID.value.magic)
    else:
        # No rule lets the largest go below the least code.
        rounded = (scaled + GRID.value.magic) - GRID.value.magic
        if GRID.value.saturates:
            rounded = tl.minimum(rounded, GRID.value.high)
    if GRID.value.mse:
        # One exponent lower: the same grid, half as wide.
        if GRID.value.is_float:
            lower = tl.minimum(scaled, GRID.value.high / 2)
            lower = _round_magnitude(lower, GRID.value.min_binade / 2, GRID.value.magic)
        else:
            lower = (scaled + GRID.value.magic / 2) - GRID.value.magic / 2
            lower = tl.minimum(tl.maximum(lower, GRID.value.low / 2), GRID.value.high / 2)
        gap = rounded - lower
        lean = tl.fma(scaled, 2.0, -(rounded + lower))
        if GRID.value.sum == 0:
            total = tl.sum(gap * lean, axis=1)
        elif GRID.value.sum == 1:
            total = tl.sum((gap * lean * GRID.value.unit).to(tl.int32), axis=1)
        elif GRID.value.sum == 2:
            total = tl.sum((gap * lean * GRID.value.unit).to(tl.int64), axis=1)
        else:
            total = tl.sum((gap.to(tl.float64) * lean.to(tl.float64) * GRID.value.unit).to(tl.int64), axis=1)
        rounded = tl.where(takes_lower(total, power)[:, None], lower, rounded)
    if GRID.value.is_float:
        rounded = _with_sign(rounded, x)
    return rounded, scale


@triton.jit
def saturated(x, dtype: tl.constexpr, GRID: tl.constexpr):
    """float32 `x` on the grid, as `dtype`; what exceeds its largest finite number becomes that, NaN stays."""
    if GRID.value.overflow == "none":
        narrow = x.to(dtype)
    # Two at a time: what exceeds is infinite by then.
    elif _PACKS and dtype == tl.bfloat16:
        narrow = tl.inline_asm_elementwise(_SATURATE_BF16, "=r,r,r", [x], dtype=tl.bfloat16, is_pure=True, pack=2)
    elif _PACKS and dtype == tl.float16:
        narrow = tl.inline_asm_elementwise(_SATURATE_FP16, "=r,r,r", [x], dtype=tl.float16, is_pure=True, pack=2)
    else:
        x = tl.minimum(x, GRID.value.largest, propagate_nan=tl.PropagateNan.ALL)
        narrow = tl.maximum(x, -GRID.value.largest, propagate_nan=tl.PropagateNan.ALL).to(dtype)
    return narrow
