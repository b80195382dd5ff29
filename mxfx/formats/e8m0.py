"""The scale of the MX formats: E8M0 powers of two, and the rules that choose one for a block.

An exponent is an int32 in [-127, 127]; `NAN_EXPONENT` (128) marks a block that holds NaN or Inf. The stored
E8M0 code is exponent + 127, so NaN is 255. Source: OCP MX v1.0, sections 5.4.1 (E8M0) and 6.3 (conversion).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

import torch
from torch import Tensor

from mxfx.formats.element import Element, FloatElement, IntElement

E8M0_BIAS = 127
MIN_EXPONENT = -127
MAX_EXPONENT = 127
NAN_EXPONENT = 128

#: How many exponents a search tries, and how far from 0.
SEARCHED = 3
SEARCH_LIMIT = 126

FLOAT32_PRECISION = 24


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


@dataclass(frozen=True)
class E8M0:
    """A power of two for each block, 8 bits: the shared scale of the MX formats.

    Chosen scales are exponents, int32 in [-127, 127], or `NAN_EXPONENT`; they are stored as exponent + 127.
    """

    rule: ScaleRule = ScaleRule.FLOOR
    bits: ClassVar[int] = 8

    def check(self, element: Element, block: int) -> None:
        """Every element and block size will do."""

    def written(self, element: Element, block: int) -> str:
        stem = f"mx{element.name}" if isinstance(element, IntElement) else f"mxfp{element.bits}_{element.name}"
        suffix = "" if self.rule is ScaleRule.FLOOR else f"/{self.rule}"
        return f"{stem}@{block}{suffix}"

    def common(self, x: Tensor, element: Element) -> None:
        return None

    def choose(self, blocks: Tensor, element: Element, common: Tensor | None = None, precision: int = 53) -> Tensor:
        """The exponent e of each block; its step is 2**e (MXINT: the step of the code)."""
        exponent = exponent_from_amax(largest_magnitude(blocks), element, self.rule)
        if self.rule is not ScaleRule.MSE:
            return exponent
        better = _is_lower_better(*_candidates(blocks, exponent, element), exponent, element, precision)
        return exponent - better.to(torch.int32)

    def candidates(self, blocks: Tensor, element: Element, common: Tensor | None, sweep: bool) -> Tensor:
        """rceil's exponent e0, at which nothing saturates, e0 - 1, e0 - 2 (more saturation, finer), and `ceil`'s.

        Limited to [-126, 126], where steps and inverses are normal float32 numbers. What other rules choose is
        among the three.
        """
        if not sweep:
            return self.choose(blocks, element)[None].clamp(-SEARCH_LIMIT, SEARCH_LIMIT)
        first = exponent_from_amax(largest_magnitude(blocks), element, ScaleRule.RCEIL)
        found = [first - lower for lower in range(SEARCHED)]
        if self.rule is ScaleRule.CEIL:
            found.append(self.choose(blocks, element))
        return torch.stack(found).clamp(-SEARCH_LIMIT, SEARCH_LIMIT)

    def round(self, blocks: Tensor, element: Element, common: Tensor | None = None, precision: int = 53) -> Tensor:
        if self.rule is not ScaleRule.MSE:
            step, inverse = self.steps(self.choose(blocks, element).unsqueeze(-1), None, blocks.dtype)
            return element.round(blocks * inverse) * step
        # Both candidates are there once the choice is made.
        exponent = exponent_from_amax(largest_magnitude(blocks), element, self.rule)
        scaled, upper, lower = _candidates(blocks, exponent, element)
        better = _is_lower_better(scaled, upper, lower, exponent, element, precision)
        return torch.where(better.unsqueeze(-1), lower, upper) * power_of_two(exponent, blocks.dtype).unsqueeze(-1)

    def steps(self, scales: Tensor, common: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return power_of_two(scales, dtype), inverse_power_of_two(scales, dtype)

    def store(self, scales: Tensor) -> Tensor:
        return (scales + E8M0_BIAS).to(torch.uint8)

    def load(self, codes: Tensor) -> Tensor:
        return codes.to(torch.int32) - E8M0_BIAS


def error_bits(element: Element, block: int, precision: int) -> tuple[float, float]:
    """Bits of any partial sum over a block of differences of squared errors under `mse`, and their common unit.

    In units of the squared scale, for entries of `precision` significant bits. What holds the bits sums without
    rounding, in any order.
    """
    step = 0.5
    if isinstance(element, FloatElement):
        step = 2.0 ** (element.min_exponent - element.mantissa_bits - 1)
    # Where the candidates differ |scaled| >= step / 2, so a difference is a multiple of this.
    unit = step * step * 2.0**-precision
    reach = 2.0 ** (element.max_exponent + 1)
    saturated = element.max_value / 2 * (2 * reach - 1.5 * element.max_value)
    ordinary = (reach * 2.0 ** -(element.mantissa_bits + 1)) ** 2
    return math.log2(max(saturated, ordinary, reach * reach / 4) * block / unit), unit


def _candidates(blocks: Tensor, exponent: Tensor, element: Element) -> tuple[Tensor, Tensor, Tensor]:
    """In units of 2**exponent: the entries, and what they round to at that exponent and at the one below."""
    scaled = blocks * inverse_power_of_two(exponent, blocks.dtype).unsqueeze(-1)
    return scaled, element.round(scaled), element.round(scaled * 2) * 0.5


def _is_lower_better(
    scaled: Tensor, upper: Tensor, lower: Tensor, exponent: Tensor, element: Element, precision: int
) -> Tensor:
    """Whether exponent - 1 has the smaller squared error, (...) bool; an equal error keeps the exponent.

    The errors are compared by their difference, factored, in units of the scale: what both candidates
    round alike drops out and huge or tiny blocks neither overflow nor underflow. Each factor is exact for
    float32 and narrower input, and the sum is taken in integers, or in float32 where that holds it: every
    backend and every order of summation finds the same answer.
    """
    searchable = (exponent != NAN_EXPONENT) & (exponent > MIN_EXPONENT)
    block = scaled.shape[-1]
    # (scaled - lower)^2 - (scaled - upper)^2, with a^2 - b^2 = (a - b)(a + b)
    if scaled.dtype == torch.float32 and error_bits(element, block, precision)[0] <= FLOAT32_PRECISION:
        return searchable & (((upper - lower) * (scaled * 2 - (upper + lower))).sum(-1) < 0)
    difference = (upper - lower).to(torch.float64) * ((scaled - lower) + (scaled - upper))
    return searchable & (_in_fixed_point(difference, element, scaled.dtype).sum(-1) < 0)


def _in_fixed_point(difference: Tensor, element: Element, compute: torch.dtype) -> Tensor:
    """int64, in the finest fraction of a squared scale with which the sum of a block fits.

    Before scaling, a squared error is less than 2^(2 · max_exponent + 1).
    """
    room = 62 - math.ceil(math.log2(difference.shape[-1]))
    counted = difference * 2.0 ** (room - 2 * element.max_exponent - 1)
    if compute == torch.float64:
        # Only float64 exceeds the largest scale, where it saturates.
        counted = counted.clamp(-(2.0**room), 2.0**room)
    return counted.to(torch.int64)
