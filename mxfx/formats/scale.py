"""Shared scales: E8M0 powers of two, and the rules that choose one for a block.

An exponent is an int32 in [-127, 127]; `NAN_EXPONENT` (128) marks a block that holds NaN or Inf. The stored
E8M0 code is exponent + 127, so NaN is 255. Source: OCP MX v1.0, sections 5.4.1 (E8M0) and 6.3 (conversion).
"""

from __future__ import annotations

import math
from enum import StrEnum

import torch
from torch import Tensor

from mxfx.formats.element import Element, IntElement

E8M0_BIAS = 127
MIN_EXPONENT = -127
MAX_EXPONENT = 127
NAN_EXPONENT = 128


class ScaleRule(StrEnum):
    """How the shared exponent of a block follows from its largest magnitude, amax.

    | rule  | shared exponent                                                    | source              |
    | ----- | ------------------------------------------------------------------ | ------------------- |
    | floor | floor(log2 amax) - emax                                            | OCP MX v1.0, 6.3    |
    | rceil | smallest e with amax <= max_value * 2^e                            | torchao RCEIL       |
    | even  | floor, of amax rounded to the element's mantissa (half away)       | torchao EVEN        |
    | ceil  | ceil(log2 amax) - emax; MXINTb: ceil(log2 amax) - b + 1            | torchao CEIL; Mase  |
    | mse   | rceil's or the one below, whichever has the smaller squared error  | mxfx                |

    emax is floor(log2 max_value), which for MXINTb is b - 2: its step under `floor` is 2^(floor(log2 amax) -
    b + 2).
    """

    FLOOR = "floor"
    RCEIL = "rceil"
    EVEN = "even"
    CEIL = "ceil"
    MSE = "mse"


def largest_magnitude(blocks: Tensor) -> Tensor:
    """amax: the largest |x| of each block, (..., block) to (...); NaN where a block holds one."""
    # Two reductions: abs would write a second tensor as large as the blocks.
    return torch.maximum(blocks.amax(-1), -blocks.amin(-1))


def exponent_from_amax(amax: Tensor, element: Element, rule: ScaleRule) -> Tensor:
    """Shared exponent for each largest magnitude.

    Args:
        amax: (...) float32 or float64, not negative, possibly NaN or Inf.
        element: the element type that the scale is for.
        rule: for `mse`, the answer is rceil's: the first of its two candidates.

    Returns:
        (...) int32, clamped to [-127, 127]; -127 for a zero block; `NAN_EXPONENT` where amax is not finite.
    """
    fraction, exponent = torch.frexp(amax)  # amax = fraction * 2^exponent, fraction in [0.5, 1)
    base = exponent - 1 - element.max_exponent
    match rule:
        case ScaleRule.FLOOR:
            chosen = base
        case ScaleRule.RCEIL | ScaleRule.MSE:
            chosen = base + (fraction > math.frexp(element.max_value)[0])
        case ScaleRule.EVEN:
            chosen = base + (fraction >= 1 - 2.0 ** -(element.mantissa_bits + 2))
        case ScaleRule.CEIL:
            # MXINT has a code, the most negative one, on the next power of two, so its ceil starts one lower.
            chosen = base + (fraction > 0.5) - int(isinstance(element, IntElement))
    chosen = torch.where(amax == 0, MIN_EXPONENT, chosen.clamp(MIN_EXPONENT, MAX_EXPONENT))
    return torch.where(amax.isfinite(), chosen, NAN_EXPONENT).to(torch.int32)


def power_of_two(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """2**exponent, exact, as float32 or float64, for int32 in [-127, 127]; NaN at `NAN_EXPONENT`."""
    code = exponent + E8M0_BIAS
    # At code 0 this bit makes float32's subnormal 2^-127; at code 255 it makes NaN of Inf.
    top_mantissa_bit = ((code == 0) | (code == 255)).to(torch.int32) << 22
    return ((code << 23) | top_mantissa_bit).view(torch.float32).to(dtype)


def inverse_power_of_two(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """2**-exponent, exact; at `NAN_EXPONENT` some finite value, as the scale itself is NaN there."""
    return power_of_two((-exponent).clamp_min(MIN_EXPONENT), dtype)
