"""Rounding a tile of blocks onto a format's grid, in registers: what every quantizing kernel ends with.

The arithmetic is that of `mxfx.formats`, operation by operation, and every operation is exact or correctly
rounded (powers of two by their bits, rounding by adding and subtracting 1.5·2^p), so a contraction into FMA
changes nothing and the result equals the CPU's bit for bit.

Importable only where `triton` is.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import triton
import triton.language as tl

from mxfx.formats import FloatElement, Format, IntElement, ScaleRule

_FLOAT32_MANTISSA = 23
_PRECISION = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24}

_SIGN = tl.constexpr(-(2**31))
_MAGNITUDE = tl.constexpr(2**31 - 1)
_EXPONENT = tl.constexpr(0x7F80_0000)
_MANTISSA = tl.constexpr(0x007F_FFFF)
_SMALLEST_NORMAL = tl.constexpr(0x0080_0000)
_TWO_TO_64 = tl.constexpr(2.0**64)


@lru_cache(maxsize=512)
def grid_constants(fmt: Format, dtype: torch.dtype) -> dict[str, object]:
    """Compile-time constants of a format for input of `dtype` (bfloat16, float16 or float32).

    `SUM` says how the squared errors of `mse` are compared: 0 in float32 and 1 in int32, where either holds
    every partial sum exactly; 2 and 3 in 64-bit fixed point (one float32 factor, two float64 factors).
    """
    element = fmt.element
    integer = isinstance(element, IntElement)
    if isinstance(element, IntElement):
        low, min_binade, magic = element.min_value, 1.0, 1.5 * 2.0**_FLOAT32_MANTISSA
    else:
        assert isinstance(element, FloatElement)
        low, min_binade = -element.max_value, 2.0**element.min_exponent
        magic = 1.5 * 2.0 ** (_FLOAT32_MANTISSA - element.mantissa_bits)
    kind, unit = _sum_of_errors(fmt, dtype)
    return {
        "LOW": low,
        "HIGH": element.max_value,
        "MIN_BINADE": min_binade,
        "MAGIC": magic,
        "OFFSET": element.max_exponent + int(integer and fmt.rule is ScaleRule.CEIL),
        "THRESHOLD": _carry_threshold(fmt),
        # Only these can round past the largest finite value of the dtype.
        "CLAMP": integer or fmt.block is None or fmt.rule not in (ScaleRule.FLOOR, ScaleRule.MSE),
        "LARGEST": torch.finfo(dtype).max,
        "FLOAT": not integer,
        "MSE": fmt.rule is ScaleRule.MSE,
        "SUM": kind,
        "UNIT": unit,
    }


def _carry_threshold(fmt: Format) -> int:
    """The exponent is one higher where the 23-bit mantissa of amax exceeds this."""
    one = 2**_FLOAT32_MANTISSA
    match fmt.rule:
        case ScaleRule.RCEIL:
            return int((2 * math.frexp(fmt.element.max_value)[0] - 1) * one)
        case ScaleRule.EVEN:
            return one - (one >> (fmt.element.mantissa_bits + 1)) - 1
        case ScaleRule.CEIL:
            return 0
    return one


def _sum_of_errors(fmt: Format, dtype: torch.dtype) -> tuple[int, float]:
    """How to sum differences of squared errors so that no rounding can change the sign of the sum."""
    if fmt.rule is not ScaleRule.MSE or fmt.block is None:
        return 0, 1.0
    element, precision = fmt.element, _PRECISION[dtype]
    step = 0.5
    if isinstance(element, FloatElement):
        step = 2.0 ** (element.min_exponent - element.mantissa_bits - 1)
    # Where the candidates differ |scaled| >= step / 2, so a difference is a multiple of this.
    smallest = step * step * 2.0**-precision
    reach = 2.0 ** (element.max_exponent + 1)
    saturated = element.max_value / 2 * (2 * reach - 1.5 * element.max_value)
    ordinary = (reach * 2.0 ** -(element.mantissa_bits + 1)) ** 2
    largest = max(saturated, ordinary, reach * reach / 4)
    bits = math.log2(largest * fmt.block / smallest)
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
def power_of_two(exponent):
    """2**exponent for int32 in [-127, 127], subnormal 2**-127 included; NaN at 128."""
    code = exponent + 127
    patch = ((code == 0) | (code == 255)).to(tl.int32) << 22
    return ((code << 23) | patch).to(tl.float32, bitcast=True)


@triton.jit
def clamp(x, low, high):
    """NaN stays NaN."""
    x = tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def round_to_element(
    y, LOW: tl.constexpr, HIGH: tl.constexpr, MIN_BINADE: tl.constexpr, MAGIC: tl.constexpr, FLOAT: tl.constexpr
):
    """Nearest element, ties to even, saturating; a float element keeps -0, an integer has none."""
    clamped = clamp(y, LOW, HIGH)
    if FLOAT:
        bits = clamped.to(tl.int32, bitcast=True)
        binade = (bits & _EXPONENT).to(tl.float32, bitcast=True)
        spacing = tl.maximum(binade, MIN_BINADE) * MAGIC
        rounded = (clamped + spacing) - spacing
        rounded = (rounded.to(tl.int32, bitcast=True) | (bits & _SIGN)).to(tl.float32, bitcast=True)
    else:
        rounded = (clamped + MAGIC) - MAGIC
    return rounded


@triton.jit
def shared_exponent(magnitude, OFFSET: tl.constexpr, THRESHOLD: tl.constexpr):
    """Exponent of a block from the bits of its largest |x|, int32; 128 where the block is not finite."""
    tiny = magnitude < _SMALLEST_NORMAL
    lifted = (magnitude.to(tl.float32, bitcast=True) * _TWO_TO_64).to(tl.int32, bitcast=True)
    bits = tl.where(tiny, lifted, magnitude)
    exponent = (bits >> 23) - (127 + OFFSET) - tl.where(tiny, 64, 0)
    exponent += ((bits & _MANTISSA) > THRESHOLD).to(tl.int32)
    exponent = tl.minimum(tl.maximum(exponent, -127), 127)
    return tl.where(magnitude >= _EXPONENT, 128, exponent)


@triton.jit
def quantize_tile(
    x,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    MIN_BINADE: tl.constexpr,
    MAGIC: tl.constexpr,
    OFFSET: tl.constexpr,
    THRESHOLD: tl.constexpr,
    CLAMP: tl.constexpr,
    LARGEST: tl.constexpr,
    FLOAT: tl.constexpr,
    MSE: tl.constexpr,
    SUM: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Rows of a float32 tile (blocks, block), each one block, lanes outside it zero; float32 on the grid."""
    magnitude = tl.max(x.to(tl.int32, bitcast=True) & _MAGNITUDE, axis=1)
    exponent = shared_exponent(magnitude, OFFSET, THRESHOLD)
    scaled = x * power_of_two(tl.maximum(-exponent, -127))[:, None]
    rounded = round_to_element(scaled, LOW, HIGH, MIN_BINADE, MAGIC, FLOAT)
    if MSE:
        lower = round_to_element(scaled * 2.0, LOW, HIGH, MIN_BINADE, MAGIC, FLOAT) * 0.5
        gap = rounded - lower
        lean = (scaled - lower) + (scaled - rounded)
        if SUM == 0:
            total = tl.sum(gap * lean, axis=1)
        elif SUM == 1:
            total = tl.sum((gap * lean * UNIT).to(tl.int32), axis=1)
        elif SUM == 2:
            total = tl.sum((gap * lean * UNIT).to(tl.int64), axis=1)
        else:
            total = tl.sum((gap.to(tl.float64) * lean.to(tl.float64) * UNIT).to(tl.int64), axis=1)
        better = (total < 0) & (exponent > -127) & (exponent < 128)
        rounded = tl.where(better[:, None], lower, rounded)
    out = rounded * power_of_two(exponent)[:, None]
    if CLAMP:
        out = clamp(out, -LARGEST, LARGEST)
    return out
