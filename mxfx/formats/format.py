"""A format as a value: element type, block size, scale rule; and what it does to a tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from mxfx.formats.chunks import fits_in_cache, map_rows
from mxfx.formats.element import Element, FloatElement, IntElement
from mxfx.formats.errors import FormatError
from mxfx.formats.packing import pack_codes, packed_length, unpack_codes
from mxfx.formats.scale import (
    E8M0_BIAS,
    MIN_EXPONENT,
    NAN_EXPONENT,
    ScaleRule,
    exponent_from_amax,
    inverse_power_of_two,
    largest_magnitude,
    power_of_two,
)

#: Significant bits of the dtypes that can be quantized.
PRECISION = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}
FLOAT_DTYPES = tuple(PRECISION)


@dataclass(frozen=True)
class Encoded:
    """A tensor as codes and shared scales.

    codes: the shape of the tensor; int8 (MXINT), uint8 (float elements up to 8 bits) or int16 (wider
    minifloats).
    scales: that shape with `axis` divided by the block size, rounded up; uint8 E8M0, 255 = NaN; None without
    blocks.
    axis: the axis that blocks run along, negative (-1 is the last).
    dtype: of the tensor that was encoded.
    """

    codes: Tensor
    scales: Tensor | None
    axis: int
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        """Shape of the encoded tensor."""
        return self.codes.shape


@dataclass(frozen=True)
class Format:
    """An MX format (`block` set) or a plain minifloat (`block` None, no scale, no rule).

    Rounds to nearest, ties to even, and saturates. A block that holds NaN or Inf gets the E8M0 scale NaN and
    decodes to NaN; a zero block stays zero; float elements keep -0, integers have none; the last block along
    an axis may be short. A minifloat without blocks turns ±Inf into its largest value and passes NaN through
    `fake_quantize`. Finite input never gives Inf: what exceeds the tensor's dtype becomes the dtype's
    largest value.

    >>> str(Format(IntElement(4), 32, ScaleRule.MSE))
    'mxint4@32/mse'
    """

    element: Element
    block: int | None
    rule: ScaleRule = ScaleRule.FLOOR

    def __post_init__(self) -> None:
        if self.block is not None and self.block < 1:
            raise FormatError(f"a block has 1 or more elements, not {self.block}")
        if self.block is None and isinstance(self.element, IntElement):
            raise FormatError(f"{self.element.name} needs a block size: an integer without a scale is no format")
        if self.block is None and self.rule is not ScaleRule.FLOOR:
            raise FormatError(f"a minifloat has no shared scale, so no scale rule; got /{self.rule}")

    def __str__(self) -> str:
        if self.block is None:
            return f"minifloat_{self.element.name}"
        integer = isinstance(self.element, IntElement)
        stem = f"mx{self.element.name}" if integer else f"mxfp{self.bits}_{self.element.name}"
        suffix = "" if self.rule is ScaleRule.FLOOR else f"/{self.rule}"
        return f"{stem}@{self.block}{suffix}"

    @property
    def bits(self) -> int:
        """Bits of one element, without its share of the scale."""
        return self.element.bits

    @property
    def bits_per_element(self) -> float:
        """Stored bits per element, the 8-bit scale shared out: 4.25 for `mxint4@32`."""
        return float(self.bits) if self.block is None else self.bits + 8 / self.block

    @property
    def is_four_bit(self) -> bool:
        """Whether elements pack two a byte."""
        return self.bits == 4

    def fake_quantize(self, x: Tensor, axis: int = -1) -> Tensor:
        """`x` rounded onto this format's grid; blocks run along `axis`.

        Args:
            x: any shape with at least one axis; float64, float32, float16 or bfloat16. Computes in float32,
            or in
                float64 for float64 input.
            axis: the axis that blocks run along. Its last block may be short.

        Returns:
            Same shape and dtype as `x`; equal, bit for bit, to `decode(encode(x, axis), x.dtype)`.

        Raises:
            FormatError: `x` is no floating-point tensor, has no axis, or has no axis `axis`.
        """
        self._check(x, axis)
        if not fits_in_cache(x):
            return map_rows(lambda rows: self._fake_quantize(rows, -1), x, axis)
        return self._fake_quantize(x, axis)

    def encode(self, x: Tensor, axis: int = -1) -> Encoded:
        """Codes and E8M0 scales of `x`; codes of a NaN block are 0.

        Raises:
            FormatError: as `fake_quantize`; or a minifloat without blocks, which has no NaN, meets one.
        """
        self._check(x, axis)
        axis = axis if axis < 0 else axis - x.dim()
        if self.block is None:
            self._check_no_nan(x)
            rounded = self.element.round(x.to(self._compute_dtype(x.dtype)))
            return Encoded(self.element.to_codes(rounded), None, axis, x.dtype)
        blocks = self._to_blocks(x, axis)
        exponent = self.shared_exponent(blocks, PRECISION[x.dtype])
        inverse = inverse_power_of_two(exponent, blocks.dtype).unsqueeze(-1)
        rounded = self.element.round(blocks * inverse)
        rounded = rounded.masked_fill((exponent == NAN_EXPONENT).unsqueeze(-1), 0.0)
        codes = self._from_blocks(self.element.to_codes(rounded), x, axis)
        scales = (exponent + E8M0_BIAS).to(torch.uint8).movedim(-1, axis)
        return Encoded(codes, scales, axis, x.dtype)

    def decode(self, encoded: Encoded, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values of `encoded` as `dtype`: saturating, NaN where the scale is 255."""
        if dtype not in FLOAT_DTYPES:
            raise FormatError(f"{self} decodes to float64, float32, float16 or bfloat16, not {dtype}")
        compute = self._compute_dtype(dtype)
        values = self.element.from_codes(encoded.codes, compute)
        if self.block is None:
            return self._to_dtype(values, dtype)
        if encoded.scales is None:
            raise FormatError(f"{self} has shared scales, but what it should decode has none")
        blocks = self._to_blocks(values, encoded.axis)
        exponent = encoded.scales.movedim(encoded.axis, -1).to(torch.int32) - E8M0_BIAS
        scaled = blocks * power_of_two(exponent, compute).unsqueeze(-1)
        return self._from_blocks(self._to_dtype(scaled, dtype), values, encoded.axis)

    def pack(self, codes: Tensor) -> Tensor:
        """Codes (..., n) as dense bytes (..., ceil(n * bits / 8)); 4-bit codes two a byte, first one low."""
        if codes.dtype != self.element.code_dtype:
            raise FormatError(f"{self} packs codes of {self.element.code_dtype}, not {codes.dtype}")
        return pack_codes(codes, self.bits)

    def unpack(self, packed: Tensor, length: int) -> Tensor:
        """The (..., length) codes that `pack` stored as (..., ceil(length * bits / 8)) uint8."""
        expected = packed_length(length, self.bits)
        if packed.dtype != torch.uint8 or packed.shape[-1] != expected:
            given = f"{packed.dtype} with {packed.shape[-1]}"
            raise FormatError(f"{self} unpacks {length} codes from uint8 rows of {expected} bytes, not {given}")
        return unpack_codes(packed, self.bits, length, self.element.code_dtype)

    def shared_exponent(self, blocks: Tensor, precision: int = 53) -> Tensor:
        """The exponent e that the rule chooses for each block; its scale is 2**e (MXINT: the step of the
        code).

        Args:
            blocks: (..., block) float32 or float64, ragged tails filled with zeros.
            precision: significant bits of an entry (8 for what was bfloat16); few allow a faster comparison under
                `mse`, with the same result.

        Returns:
            (...) int32 in [-127, 127]; 128 for a block that holds NaN or Inf.
        """
        exponent = exponent_from_amax(largest_magnitude(blocks), self.element, self.rule)
        if self.rule is not ScaleRule.MSE:
            return exponent
        return exponent - self._is_lower_better(*self._candidates(blocks, exponent), exponent, precision).to(
            torch.int32
        )

    def candidate_exponents(self, blocks: Tensor) -> Tensor:
        """Exponents worth searching, whatever the rule: rceil's e0, at which nothing saturates, then e0 - 1 and
        e0 - 2 (more saturation, finer).

        Args:
            blocks: (..., block) float32 or float64.

        Returns:
            (3, ...) int32, at least -127; all three are 128 for a block that holds NaN or Inf.
        """
        first = exponent_from_amax(largest_magnitude(blocks), self.element, ScaleRule.RCEIL)
        lower = [(first - offset).clamp_min(MIN_EXPONENT) for offset in (0, 1, 2)]
        return torch.stack([torch.where(first == NAN_EXPONENT, first, candidate) for candidate in lower])

    def round_to_grid(self, x: Tensor, exponent: Tensor) -> Tensor:
        """`x` rounded to the nearest of the element's values times 2**exponent, ties to even, saturating.

        Args:
            x: float32 or float64.
            exponent: int32 in [-127, 128], broadcasting against `x`; 128 gives NaN.
        """
        scaled = x * inverse_power_of_two(exponent, x.dtype)
        return self.element.round(scaled) * power_of_two(exponent, x.dtype)

    def _fake_quantize(self, x: Tensor, axis: int) -> Tensor:
        if self.block is None:
            return self._to_dtype(self.element.round(x.to(self._compute_dtype(x.dtype))), x.dtype)
        blocks = self._to_blocks(x, axis)
        if self.rule is ScaleRule.MSE:
            values = self._round_by_error(blocks, PRECISION[x.dtype])
        else:
            values = self.round_to_grid(blocks, self.shared_exponent(blocks).unsqueeze(-1))
        return self._from_blocks(self._to_dtype(values, x.dtype), x, axis)

    def _round_by_error(self, blocks: Tensor, precision: int) -> Tensor:
        """What `round_to_grid` gives at the exponents of `mse`; both candidates are there once the choice is made."""
        exponent = exponent_from_amax(largest_magnitude(blocks), self.element, self.rule)
        scaled, upper, lower = self._candidates(blocks, exponent)
        better = self._is_lower_better(scaled, upper, lower, exponent, precision)
        return torch.where(better.unsqueeze(-1), lower, upper) * power_of_two(exponent, blocks.dtype).unsqueeze(-1)

    def error_bits(self, precision: int) -> tuple[float, float]:
        """Bits of any partial sum over a block of differences of squared errors under `mse`, and their common unit.

        In units of the squared scale, for entries of `precision` significant bits. What holds the bits sums without
        rounding, in any order.
        """
        assert self.block is not None
        element, step = self.element, 0.5
        if isinstance(element, FloatElement):
            step = 2.0 ** (element.min_exponent - element.mantissa_bits - 1)
        # Where the candidates differ |scaled| >= step / 2, so a difference is a multiple of this.
        unit = step * step * 2.0**-precision
        reach = 2.0 ** (element.max_exponent + 1)
        saturated = element.max_value / 2 * (2 * reach - 1.5 * element.max_value)
        ordinary = (reach * 2.0 ** -(element.mantissa_bits + 1)) ** 2
        return math.log2(max(saturated, ordinary, reach * reach / 4) * self.block / unit), unit

    def _candidates(self, blocks: Tensor, exponent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """In units of 2**exponent: the entries, and what they round to at that exponent and at the one below."""
        scaled = blocks * inverse_power_of_two(exponent, blocks.dtype).unsqueeze(-1)
        return scaled, self.element.round(scaled), self.element.round(scaled * 2) * 0.5

    def _is_lower_better(
        self, scaled: Tensor, upper: Tensor, lower: Tensor, exponent: Tensor, precision: int
    ) -> Tensor:
        """Whether exponent - 1 has the smaller squared error, (...) bool; an equal error keeps the exponent.

        The errors are compared by their difference, factored, in units of the scale: what both candidates
        round alike drops out and huge or tiny blocks neither overflow nor underflow. Each factor is exact for
        float32 and narrower input, and the sum is taken in integers, or in float32 where that holds it: every
        backend and every order of summation finds the same answer.
        """
        searchable = (exponent != NAN_EXPONENT) & (exponent > MIN_EXPONENT)
        # (scaled - lower)^2 - (scaled - upper)^2, with a^2 - b^2 = (a - b)(a + b)
        if scaled.dtype == torch.float32 and self.error_bits(precision)[0] <= PRECISION[torch.float32]:
            return searchable & (((upper - lower) * (scaled * 2 - (upper + lower))).sum(-1) < 0)
        difference = (upper - lower).to(torch.float64) * ((scaled - lower) + (scaled - upper))
        return searchable & (self._in_fixed_point(difference, scaled.dtype).sum(-1) < 0)

    def _in_fixed_point(self, difference: Tensor, compute: torch.dtype) -> Tensor:
        """int64, in the finest fraction of a squared scale with which the sum of a block fits.

        Before scaling, a squared error is less than 2^(2 · max_exponent + 1).
        """
        assert self.block is not None
        room = 62 - math.ceil(math.log2(self.block))
        counted = difference * 2.0 ** (room - 2 * self.element.max_exponent - 1)
        if compute == torch.float64:
            # Only float64 exceeds the largest scale, where it saturates.
            counted = counted.clamp(-(2.0**room), 2.0**room)
        return counted.to(torch.int64)

    def _compute_dtype(self, dtype: torch.dtype) -> torch.dtype:
        # With 8 exponent bits the element is as wide as float32, so that rounding has no headroom in float32.
        wide = isinstance(self.element, FloatElement) and self.element.exponent_bits == 8
        return torch.float64 if wide or dtype == torch.float64 else torch.float32

    def _to_blocks(self, x: Tensor, axis: int) -> Tensor:
        """(..., n at axis, ...) as (..., blocks, block) in the compute dtype, a ragged tail zero-filled."""
        assert self.block is not None
        last = x.movedim(axis, -1).to(self._compute_dtype(x.dtype))
        length = last.shape[-1]
        count = (length + self.block - 1) // self.block
        if not statically_known_true(length % self.block == 0):
            # Not F.pad: on fake tensors of four axes it fixes symbolic sizes to those of the example.
            zeros = last.new_zeros((*last.shape[:-1], count * self.block - length))
            last = torch.cat((last, zeros), dim=-1)
        return last.unflatten(-1, (count, self.block))

    def _from_blocks(self, blocks: Tensor, like: Tensor, axis: int) -> Tensor:
        """(..., blocks, block) back to the shape of `like`, the filling of a ragged tail cut off."""
        assert self.block is not None
        length = like.shape[axis]
        flat = blocks.flatten(-2)
        if not statically_known_true(length % self.block == 0):
            flat = flat[..., :length]
        return flat.movedim(-1, axis)

    def _to_dtype(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        largest = torch.finfo(dtype).max
        return values.clamp(-largest, largest).to(dtype)

    def _check(self, x: Tensor, axis: int) -> None:
        if x.dtype not in FLOAT_DTYPES:
            raise FormatError(f"{self} takes float64, float32, float16 or bfloat16, not {x.dtype}")
        if not -x.dim() <= axis < x.dim():
            raise FormatError(f"{self} along axis {axis} needs a tensor that has it, not shape {tuple(x.shape)}")

    def _check_no_nan(self, x: Tensor) -> None:
        count = int(x.isnan().sum())
        if count:
            raise FormatError(f"{self} has no code for NaN, and {count} of {x.numel()} elements are NaN")
