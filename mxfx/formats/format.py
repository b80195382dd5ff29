"""A format as a value: element type, block size, scale; and what it does to a tensor."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import cache

import torch
from torch import Tensor

from mxfx.formats.chunks import fits_in_cache, map_rows
from mxfx.formats.e8m0 import E8M0
from mxfx.formats.element import Element, FloatElement, IntElement, Rounding
from mxfx.formats.errors import FormatError
from mxfx.formats.known import known_true
from mxfx.formats.packing import pack_codes, packed_length, unpack_codes
from mxfx.formats.scale import Scale

OCP_SCALE = E8M0()


@cache
def precisions() -> dict[torch.dtype, int]:
    """Significant bits of each dtype that formats encode and decode."""
    return {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}


@dataclass(frozen=True)
class Encoded:
    """A tensor as codes and shared scales.

    codes: the shape of the tensor; int8 (MXINT), uint8 (float elements up to 8 bits) or int16 (wider
    minifloats).
    scales: that shape with `axis` divided by the block size, rounded up; uint8 codes of the format's scale (E8M0, where
    255 is NaN; E4M3 for NVFP4); None without blocks.
    axis: the axis that blocks run along, negative (-1 is the last).
    dtype: of the tensor that was encoded.
    common: what all blocks share beside it, a float32 number (NVFP4); None for most formats.
    """

    codes: Tensor
    scales: Tensor | None
    axis: int
    dtype: torch.dtype
    common: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """Shape of the encoded tensor."""
        return self.codes.shape


@dataclass(frozen=True)
class Format:
    """A format with blocks that share a scale (`block` set) or a plain minifloat (`block` None, scale unused).

    Rounds to nearest, ties to even, and saturates. A block that holds NaN or Inf gets the scale NaN and decodes to NaN;
    a zero block stays zero; float elements keep -0, integers have none; the last block along an axis may be short. A
    minifloat without blocks turns ±Inf into its largest value and passes NaN through `fake_quantize`. Finite input
    never gives Inf: what exceeds the tensor's dtype becomes the dtype's largest value.

    >>> str(Format(IntElement(4), 32, E8M0(ScaleRule.MSE)))
    'mxint4@32/mse'
    """

    element: Element
    block: int | None
    scale: Scale = OCP_SCALE

    def __post_init__(self) -> None:
        if self.block is None:
            if isinstance(self.element, IntElement):
                raise FormatError(f"{self.element.name} needs a block size: an integer without a scale is no format")
            if self.scale != OCP_SCALE:
                raise FormatError(f"a minifloat has no shared scale, so no scale rule; got /{self.rule}")
            return
        if self.block < 1:
            raise FormatError(f"a block has 1 or more elements, not {self.block}")
        self.scale.check(self.element, self.block)

    def __str__(self) -> str:
        if self.block is not None:
            return self.scale.written(self.element, self.block)
        assert isinstance(self.element, FloatElement)
        ieee = "_ieee" if self.element.reserved_codes else ""
        return f"minifloat_{self.element.name}{ieee}" + ("" if self.rounding == "rn" else f"/{self.rounding}")

    @property
    def rounding(self) -> Rounding:
        """Which neighbour an entry between two elements becomes: the nearest (`rn`), or as `FloatElement` says."""
        return self.element.rounding if isinstance(self.element, FloatElement) else "rn"

    @property
    def rule(self) -> StrEnum:
        """How a block's scale follows from its entries."""
        return self.scale.rule

    @property
    def bits(self) -> int:
        """Bits of one element, without its share of the scale."""
        return self.element.bits

    @property
    def bits_per_element(self) -> float:
        """Stored bits per element, the block's scale shared out: 4.25 for `mxint4@32`, 4.5 for `nvfp4`.

        What a whole tensor has once, such as NVFP4's float32, is not counted.
        """
        return float(self.bits) if self.block is None else self.bits + self.scale.bits / self.block

    @property
    def is_four_bit(self) -> bool:
        """Whether elements pack two a byte."""
        return self.bits == 4

    def fake_quantize(self, x: Tensor, axis: int = -1, common: Tensor | None = None) -> Tensor:
        """`x` rounded onto this format's grid; blocks run along `axis`.

        Args:
            x: any shape with at least one axis; float64, float32, float16 or bfloat16. Computes in float32,
            or in
                float64 for float64 input.
            axis: the axis that blocks run along. Its last block may be short.
            common: `common` of the tensor that `x` is a part of, by default of `x` itself; one number, or one for
                each block, of `x`'s shape with `axis` last and as long as there are blocks (or 1).

        Returns:
            Same shape and dtype as `x`; equal, bit for bit, to `decode(encode(x, axis), x.dtype)`.

        Raises:
            FormatError: `x` is no floating-point tensor, has no axis, or has no axis `axis`.
        """
        self._check(x, axis)
        # Before rows are taken apart: it belongs to all of them.
        common = self.common(x) if common is None else common
        if not fits_in_cache(x) and (common is None or common.dim() == 0):
            return map_rows(lambda rows: self._fake_quantize(rows, -1, common), x, axis)
        return self._fake_quantize(x, axis, common)

    def encode(self, x: Tensor, axis: int = -1) -> Encoded:
        """Codes and scales of `x`; codes of a NaN block are 0.

        Raises:
            FormatError: as `fake_quantize`; or a minifloat without blocks, which has no NaN, meets one.
        """
        self._check(x, axis)
        axis = axis if axis < 0 else axis - x.dim()
        if self.block is None:
            self._check_no_nan(x)
            rounded = self.element.round(x.to(self._compute_dtype(x.dtype)))
            return Encoded(self.element.to_codes(rounded), None, axis, x.dtype)
        blocks, common = self._to_blocks(x, axis), self.common(x)
        chosen = self.scale.choose(blocks, self.element, common, precisions()[x.dtype])
        step, inverse = self.scale.steps(chosen, common, blocks.dtype)
        rounded = self.element.round(blocks * inverse.unsqueeze(-1))
        rounded = rounded.masked_fill(step.isnan().unsqueeze(-1), 0.0)
        codes = self._from_blocks(self.element.to_codes(rounded), x, axis)
        return Encoded(codes, self.scale.store(chosen).movedim(-1, axis), axis, x.dtype, common)

    def decode(self, encoded: Encoded, dtype: torch.dtype | None = None) -> Tensor:
        """The values of `encoded` as `dtype` (float32 if not given): saturating, NaN where the scale is NaN."""
        dtype = dtype or torch.float32
        if dtype not in precisions():
            raise FormatError(f"{self} decodes to float64, float32, float16 or bfloat16, not {dtype}")
        compute = self._compute_dtype(dtype)
        values = self.element.from_codes(encoded.codes, compute)
        if self.block is None:
            return self._to_dtype(values, dtype)
        if encoded.scales is None:
            raise FormatError(f"{self} has shared scales, but what it should decode has none")
        blocks = self._to_blocks(values, encoded.axis)
        scales = self.scale.load(encoded.scales.movedim(encoded.axis, -1))
        step, _ = self.scale.steps(scales, encoded.common, compute)
        return self._from_blocks(self._to_dtype(blocks * step.unsqueeze(-1), dtype), values, encoded.axis)

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

    def common(self, x: Tensor) -> Tensor | None:
        """What all blocks of the tensor `x` share beside their own scales, one number; None for most formats.

        Hand it to the other methods where they see a part of that tensor only.
        """
        return None if self.block is None else self.scale.common(x, self.element)

    def choose(self, blocks: Tensor, common: Tensor | None = None) -> Tensor:
        """The scale of each block of (..., block), as (...) of the kind that `scale` says (E8M0: int32 exponents)."""
        return self.scale.choose(blocks, self.element, self.common(blocks) if common is None else common)

    def round_to_grid(self, x: Tensor, scales: Tensor, common: Tensor | None = None) -> Tensor:
        """`x` rounded to the nearest of the element's values times a scale, ties to even, saturating.

        Args:
            x: float32 or float64.
            scales: as `choose` gives, broadcasting against `x`; NaN scales give NaN.
            common: as `common` gives; needed where the format has such.
        """
        step, inverse = self.scale.steps(scales, common, x.dtype)
        return self.element.round(x * inverse) * step

    def _fake_quantize(self, x: Tensor, axis: int, common: Tensor | None) -> Tensor:
        if self.block is None:
            return self._to_dtype(self.element.round(x.to(self._compute_dtype(x.dtype))), x.dtype)
        blocks = self._to_blocks(x, axis)
        values = self.scale.round(blocks, self.element, common, precisions()[x.dtype])
        return self._from_blocks(self._to_dtype(values, x.dtype), x, axis)

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
        if not known_true(length % self.block == 0):
            # Not F.pad: on fake tensors of four axes it fixes symbolic sizes to those of the example.
            zeros = last.new_zeros((*last.shape[:-1], count * self.block - length))
            last = torch.cat((last, zeros), dim=-1)
        return last.unflatten(-1, (count, self.block))

    def _from_blocks(self, blocks: Tensor, like: Tensor, axis: int) -> Tensor:
        """(..., blocks, block) back to the shape of `like`, the filling of a ragged tail cut off."""
        assert self.block is not None
        length = like.shape[axis]
        flat = blocks.flatten(-2)
        if not known_true(length % self.block == 0):
            flat = flat[..., :length]
        return flat.movedim(-1, axis)

    def _to_dtype(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        largest = torch.finfo(dtype).max
        return values.clamp(-largest, largest).to(dtype)

    def _check(self, x: Tensor, axis: int) -> None:
        if x.dtype not in precisions():
            raise FormatError(f"{self} takes float64, float32, float16 or bfloat16, not {x.dtype}")
        if not -x.dim() <= axis < x.dim():
            raise FormatError(f"{self} along axis {axis} needs a tensor that has it, not shape {tuple(x.shape)}")

    def _check_no_nan(self, x: Tensor) -> None:
        count = int(x.isnan().sum())
        if count:
            raise FormatError(f"{self} has no code for NaN, and {count} of {x.numel()} elements are NaN")
