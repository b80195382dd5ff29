"""MX formats by brute force in float64, sharing no code and no formula with mxfx.formats.

Element values are enumerated from the specification's definition of each code; rounding looks every number
up among them; exponents are looked up in a table of powers of two.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import torch

OCP_FLOATS = {"e2m1": (2, 1, 1), "e3m2": (3, 2, 3), "e2m3": (2, 3, 1), "e4m3": (4, 3, 7), "e5m2": (5, 2, 15)}
"""Exponent bits, mantissa bits and bias: OCP MX v1.0, table 3, and OCP FP8 v1.0."""

FLOATS = {**OCP_FLOATS, "e1m2": (1, 2, 0), "e3m4": (3, 4, 3)}
"""With the two of the tutorial's dialect that OCP does not have; every code a finite number."""

RULES = ("floor", "rceil", "even", "ceil", "mse")
MX_FLOATS = ("mxfp4_e2m1", "mxfp6_e3m2", "mxfp6_e2m3", "mxfp8_e4m3", "mxfp8_e5m2")
MORE_FLOATS = ("mxfp4_e1m2", "mxfp8_e3m4")
MX_INTS = tuple(f"mxint{bits}" for bits in range(2, 9))

_POWERS = np.ldexp(1.0, np.arange(-1074, 1024))


def float_magnitudes(exponent_bits: int, mantissa_bits: int, bias: int) -> np.ndarray:
    """Value of every code without its sign bit, in code order, Inf and NaN encodings not excluded."""
    values = []
    for field in range(2**exponent_bits):
        for mantissa in range(2**mantissa_bits):
            fraction = mantissa / 2**mantissa_bits
            values.append(fraction * 2.0 ** (1 - bias) if field == 0 else (1 + fraction) * 2.0 ** (field - bias))
    return np.array(values)


def ocp_magnitudes(name: str) -> np.ndarray:
    """Finite magnitudes of a float element in code order."""
    values = float_magnitudes(*FLOATS[name])
    if name == "e4m3":
        return values[:-1]  # S.1111.111 is NaN
    return values[:-4] if name == "e5m2" else values  # E5M2: S.11111.00 is Inf, the other three NaN


def nearest(values: np.ndarray, grid: np.ndarray, even: np.ndarray) -> np.ndarray:
    """For each value the nearest of the ascending `grid`, of two equally near ones the one that is `even`."""
    above = np.clip(np.searchsorted(grid, values), 1, len(grid) - 1)
    low, high = grid[above - 1], grid[above]
    to_low, to_high = values - low, high - values
    pick_high = (to_high < to_low) | ((to_high == to_low) & even[above])
    return np.where(pick_high, high, low)


class Reference:
    """One format, such as `mxint4` with rule `ceil`, on blocks (rows, block) of float64."""

    def __init__(self, stem: str, rule: str) -> None:
        self.rule = rule
        self.integer = stem.startswith("mxint")
        if self.integer:
            self.bits = int(stem.removeprefix("mxint"))
            self.grid = np.arange(-(2 ** (self.bits - 1)), 2 ** (self.bits - 1)).astype(np.float64)
            self.even = self.grid % 2 == 0
            self.mantissa_bits = self.bits - 2
            self.largest = 2.0 ** (self.bits - 1) - 1
        else:
            self.grid = ocp_magnitudes(stem.split("_")[1])
            self.even = np.arange(len(self.grid)) % 2 == 0
            self.mantissa_bits = FLOATS[stem.split("_")[1]][1]
            self.largest = self.grid[-1]

    def exponents(self, blocks: np.ndarray) -> np.ndarray:
        """Shared exponent per finite block."""
        amax = np.abs(blocks).max(-1)
        floor = self._clamp(amax, self._floor(amax) - self._floor(self.largest))
        if self.rule == "floor":
            return floor
        usable = np.arange(-1074, 1014)
        rceil = self._clamp(amax, usable[np.searchsorted(np.ldexp(self.largest, usable), amax)])
        if self.rule == "rceil":
            return rceil
        if self.rule == "even":
            quantum = np.exp2(np.maximum(self._floor(amax) - self.mantissa_bits, -1074.0))
            rounded = np.floor(amax / quantum + 0.5) * quantum
            return self._clamp(amax, self._floor(rounded) - self._floor(self.largest))
        if self.rule == "ceil":
            ceil = np.searchsorted(_POWERS, amax) - 1074
            offset = self.bits - 1 if self.integer else self._floor(self.largest)
            return self._clamp(amax, ceil - offset)
        return np.where(self._prefers_lower(blocks, rceil), rceil - 1, rceil)

    def round(self, blocks: np.ndarray, exponents: np.ndarray) -> np.ndarray:
        """Every number of each block at the nearest of the element's values times 2**exponent."""
        step = np.exp2(exponents.astype(np.float64))[:, None]
        if self.integer:
            return nearest(blocks / step, self.grid, self.even) * step
        return np.copysign(nearest(np.abs(blocks) / step, self.grid, self.even), blocks) * step

    def __call__(self, blocks: torch.Tensor) -> torch.Tensor:
        """(rows, block) of any float dtype to float64; a block with NaN or Inf becomes NaN."""
        values = blocks.double().numpy()
        finite = np.isfinite(values).all(-1)
        usable = np.where(finite[:, None], values, 0.0)
        with np.errstate(over="ignore", invalid="ignore"):  # float64 reaches far beyond E8M0
            rounded = self.round(usable, self.exponents(usable))
        return torch.from_numpy(np.where(finite[:, None], rounded, np.nan))

    @staticmethod
    def _floor(values: np.ndarray | float) -> np.ndarray:
        return np.searchsorted(_POWERS, values, side="right") - 1 - 1074

    @staticmethod
    def _clamp(amax: np.ndarray, exponents: np.ndarray) -> np.ndarray:
        return np.where(amax == 0, -127, np.clip(exponents, -127, 127))

    def _prefers_lower(self, blocks: np.ndarray, upper: np.ndarray) -> np.ndarray:
        lower = np.maximum(upper - 1, -127)
        unit = np.exp2(upper.astype(np.float64))[:, None]
        at_upper = (blocks - self.round(blocks, upper)) / unit
        at_lower = (blocks - self.round(blocks, lower)) / unit
        gap = (at_lower**2).sum(-1) - (at_upper**2).sum(-1)
        unsure = np.abs(gap) < 1e-9
        for row in np.flatnonzero(unsure & (at_lower != at_upper).any(-1)):
            exact = sum(Fraction(d) ** 2 for d in at_lower[row]) - sum(Fraction(d) ** 2 for d in at_upper[row])
            gap[row] = float(exact)
        gap[unsure & (at_lower == at_upper).all(-1)] = 0.0
        return gap < 0


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Equal dtype, shape and bits, so that -0 differs from 0; every NaN equals every other."""
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16}[first.element_size()]
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    equal = first.contiguous().view(integer) == second.contiguous().view(integer)
    return bool((equal | (first.isnan() & second.isnan())).all())


def saturated_to(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`values` in `dtype`, what lies beyond it at its largest value."""
    largest = torch.finfo(dtype).max
    return values.clamp(-largest, largest).to(dtype)


def bf16_patterns() -> torch.Tensor:
    """All 65,536 of them, NaNs and infinities included."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def fp16_patterns() -> torch.Tensor:
    """All 65,536 of them, NaNs and infinities included."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
