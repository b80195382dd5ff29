"""Element types: what one number inside a block can be.

An element lives on a fixed grid of its own (integers, or small floating-point values); the shared scale of
its block moves that grid. Everything here works in that element domain and is exact: rounding adds and
subtracts a power of two, never divides. Source: OCP Microscaling Formats (MX) Specification v1.0, section
5.3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from mxfx.formats.bits import layout_of
from mxfx.formats.errors import FormatError

Rounding = Literal["rn", "rd", "ru", "rz"]


class Element(Protocol):
    """One element type; `IntElement` and `FloatElement` are the two there are."""

    @property
    def name(self) -> str:
        """Name of the type without block and rule, such as `int4` or `e2m1`."""

    @property
    def bits(self) -> int:
        """Stored bits of one element, sign included."""

    @property
    def mantissa_bits(self) -> int:
        """Bits behind the leading one of the largest binade."""

    @property
    def max_value(self) -> float:
        """Largest positive value."""

    @property
    def max_exponent(self) -> int:
        """floor(log2(max_value)): `emax` of the OCP specification."""

    @property
    def code_dtype(self) -> torch.dtype:
        """Integer dtype that holds one unpacked code."""

    def round(self, y: Tensor) -> Tensor:
        """`y` rounded to an element (the nearest, ties to even, unless it says otherwise), saturating; NaN stays NaN.

        float32 or float64.
        """

    def to_codes(self, values: Tensor) -> Tensor:
        """Codes of values that `round` returned, as `code_dtype`."""

    def from_codes(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """Values of codes as `dtype`, float32 or float64."""


@dataclass(frozen=True)
class IntElement:
    """Two's complement integer of `bits` bits: codes -2^(bits-1) .. 2^(bits-1) - 1, all of them used."""

    bits: int

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise FormatError(f"an integer element has 2 to 8 bits, not {self.bits}")

    @property
    def name(self) -> str:
        return f"int{self.bits}"

    @property
    def mantissa_bits(self) -> int:
        return self.bits - 2

    @property
    def max_value(self) -> float:
        return float(2 ** (self.bits - 1) - 1)

    @property
    def min_value(self) -> float:
        """Smallest code; one further from zero than `max_value`."""
        return -float(2 ** (self.bits - 1))

    @property
    def max_exponent(self) -> int:
        return self.bits - 2

    @property
    def code_dtype(self) -> torch.dtype:
        return torch.int8

    def round(self, y: Tensor) -> Tensor:
        clamped = y.clamp(self.min_value, self.max_value)
        # Beside this constant the unit in the last place is 1, so the addition rounds; unlike torch.round,
        # the difference is never -0, which an integer code could not hold.
        magic = 1.5 * 2.0 ** layout_of(y.dtype).mantissa_bits
        return (clamped + magic) - magic

    def to_codes(self, values: Tensor) -> Tensor:
        return values.to(torch.int8)

    def from_codes(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        return codes.to(dtype)


@dataclass(frozen=True)
class FloatElement:
    """Sign, `exponent_bits`, `mantissa_bits`; bias 2^(exponent_bits-1) - 1, gradual underflow.

    `reserved_codes` counts the largest magnitudes that the type gives to Inf and NaN: 1 for OCP E4M3, 4 for
    OCP E5M2, otherwise 0 (every code is a finite number). None of them is ever produced: rounding saturates.
    `rounding` is to nearest with ties to even (`rn`), down (`rd`), up (`ru`) or towards zero (`rz`).
    """

    exponent_bits: int
    mantissa_bits: int
    reserved_codes: int = 0
    rounding: Rounding = "rn"

    def __post_init__(self) -> None:
        if not 1 <= self.exponent_bits <= 8:
            raise FormatError(f"a float element has 1 to 8 exponent bits, not {self.exponent_bits}")
        if self.mantissa_bits < 0 or self.bits > 16:
            raise FormatError(
                f"a float element has 0 or more mantissa bits and at most 16 bits in all, not {self.name}"
            )

    @property
    def name(self) -> str:
        return f"e{self.exponent_bits}m{self.mantissa_bits}"

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def bias(self) -> int:
        """What is subtracted from the exponent field."""
        return 2 ** (self.exponent_bits - 1) - 1

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal value; below it lie the subnormals."""
        return 1 - self.bias

    @property
    def max_value(self) -> float:
        top = 2 ** (self.exponent_bits + self.mantissa_bits) - 1 - self.reserved_codes
        field, fraction = divmod(top, 2**self.mantissa_bits)
        leading = 1 if field else 0
        exponent = max(field, 1) - self.bias
        return math.ldexp(leading + fraction / 2**self.mantissa_bits, exponent)

    @property
    def max_exponent(self) -> int:
        return math.frexp(self.max_value)[1] - 1

    @property
    def code_dtype(self) -> torch.dtype:
        return torch.uint8 if self.bits <= 8 else torch.int16

    def round(self, y: Tensor) -> Tensor:
        layout = layout_of(y.dtype)
        clamped = y.clamp(-self.max_value, self.max_value)
        binade = (clamped.view(layout.integer) & layout.exponent_mask).view(y.dtype)
        binade = binade.clamp_min(2.0**self.min_exponent)
        if self.rounding != "rn":
            # A power of two: dividing by it is exact.
            step = binade * 2.0**-self.mantissa_bits
            directed = {"rd": torch.floor, "ru": torch.ceil, "rz": torch.trunc}[self.rounding]
            return (directed(clamped / step) * step).copysign(clamped)
        # Beside 1.5 * 2^(p + digits) the unit in the last place is that of the element in binade p.
        magic = binade * (1.5 * 2.0 ** (layout.mantissa_bits - self.mantissa_bits))
        return ((clamped + magic) - magic).copysign(clamped)

    def to_codes(self, values: Tensor) -> Tensor:
        layout = layout_of(values.dtype)
        # Scaled so that the two biases agree, the element's bits are the top bits of the float, subnormals
        # included.
        aligned = values.abs() * 2.0 ** (self.bias - layout.bias)
        magnitude = aligned.view(layout.integer) >> (layout.mantissa_bits - self.mantissa_bits)
        sign = torch.signbit(values).to(layout.integer) << (self.bits - 1)
        return (magnitude | sign).to(self.code_dtype)

    def from_codes(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        layout = layout_of(dtype)
        wide = codes.to(layout.integer)
        magnitude = (wide & (2 ** (self.bits - 1) - 1)) << (layout.mantissa_bits - self.mantissa_bits)
        values = magnitude.view(dtype) * 2.0 ** (layout.bias - self.bias)
        return torch.where((wide >> (self.bits - 1)) & 1 == 1, -values, values)
