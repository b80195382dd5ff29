"""The scale of NVFP4: an FP8 number for each block of 16, times one float32 for the tensor.

The float32 g maps the largest magnitude of the tensor to the largest element times the largest block scale; a
block's scale is amax / largest element in units of g, rounded to OCP E4M3 and kept to its normal numbers. Every
operation is that of torchao's `nvfp4_quantize`, and so are the bits. Sources: NVIDIA, "Pretraining Large Language
Models with NVFP4", arXiv 2509.25149; "Four Over Six", arXiv 2512.02010.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

import torch
from torch import Tensor

from mxfx.formats.element import Element, FloatElement
from mxfx.formats.errors import FormatError
from mxfx.formats.known import known_true

NAN_CODE = 0x7F
NVFP4_ELEMENT = FloatElement(2, 1)
NVFP4_BLOCK = 16
_SCALE = FloatElement(4, 3, reserved_codes=1)
_SMALLEST = 2.0**_SCALE.min_exponent
_SMALLEST_FLOAT32 = 2.0**-126


class BlockRule(StrEnum):
    """What the largest magnitude of a block, amax, is mapped to.

    | rule          | amax becomes                                            | source               |
    | ------------- | ------------------------------------------------------- | -------------------- |
    | six           | 6, the largest element                                  | NVFP4; torchao       |
    | four-over-six | 6 or 4, whichever gives the smaller squared error       | arXiv 2512.02010     |
    """

    SIX = "six"
    FOUR_OVER_SIX = "four-over-six"


@dataclass(frozen=True)
class E4M3:
    """An unsigned E4M3 number for each block and one float32 for the tensor: the scale of NVFP4.

    Chosen scales are the E4M3 numbers, as float32 or float64, NaN for a block that holds NaN or Inf. What all blocks
    have in common, g, is a float32 value; NaN and Inf have no part in it, so they stay in their blocks. For an
    activation the tensor is that of the call: g follows what is there, other rows included.
    """

    rule: BlockRule = BlockRule.SIX
    bits: ClassVar[int] = 8

    def check(self, element: Element, block: int) -> None:
        if element != NVFP4_ELEMENT or block != NVFP4_BLOCK:
            raise FormatError(f"E4M3 scales make nvfp4: e2m1 in blocks of 16, not {element.name} in blocks of {block}")

    def written(self, element: Element, block: int) -> str:
        return "nvfp4" if self.rule is BlockRule.SIX else f"nvfp4/{self.rule}"

    def common(self, x: Tensor, element: Element) -> Tensor:
        if known_true(x.numel() == 0):
            return torch.ones((), dtype=torch.float32, device=x.device)
        amax = torch.where(x.isfinite(), x, 0.0).abs().amax().to(torch.float32)
        amax = amax.clamp_max(torch.finfo(torch.float32).max)
        unit = amax / (self._largest_scale * element.max_value)
        return torch.where(amax == 0, 1.0, unit.clamp_min(_SMALLEST_FLOAT32))

    @property
    def _largest_scale(self) -> float:
        # 256 leaves the block that holds the largest magnitude room for a scale of 6 / 4 times that.
        return _SCALE.max_value if self.rule is BlockRule.SIX else 256.0

    def choose(self, blocks: Tensor, element: Element, common: Tensor | None, precision: int = 53) -> Tensor:
        six = _scale_for(blocks, element.max_value, common)
        if self.rule is BlockRule.SIX:
            return six
        four = _scale_for(blocks, 4.0, common)
        better = self._error(blocks, four, six, element, common) < self._error(blocks, six, six, element, common)
        return torch.where(better, four, six)

    def _error(self, blocks: Tensor, scales: Tensor, unit: Tensor, element: Element, common: Tensor | None) -> Tensor:
        """Squared error of each block, (...) float64, in units in which amax is about 6."""
        step, inverse = (part.unsqueeze(-1) for part in self.steps(scales, common, blocks.dtype))
        to_unit = self.steps(unit, common, blocks.dtype)[1].unsqueeze(-1).double()
        rounded = element.round(blocks * inverse).double() * step.double()
        return ((rounded - blocks.double()) * to_unit).square().sum(-1)

    def candidates(self, blocks: Tensor, element: Element, common: Tensor | None, sweep: bool) -> Tensor:
        """The rule's alone, or those that map amax to 6, to 5 (amax rounds to 6 or 4, the rest finer), and to 4."""
        if not sweep:
            return self.choose(blocks, element, common)[None]
        return torch.stack([_scale_for(blocks, target, common) for target in (element.max_value, 5.0, 4.0)])

    def round(self, blocks: Tensor, element: Element, common: Tensor | None, precision: int = 53) -> Tensor:
        step, inverse = self.steps(self.choose(blocks, element, common), common, blocks.dtype)
        return element.round(blocks * inverse.unsqueeze(-1)) * step.unsqueeze(-1)

    def steps(self, scales: Tensor, common: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        assert common is not None
        unit = common.to(dtype)
        return unit * scales.to(dtype), (1.0 / unit) / scales.to(dtype)

    def store(self, scales: Tensor) -> Tensor:
        codes = _SCALE.to_codes(torch.where(scales.isnan(), 0.0, scales))
        return codes.masked_fill(scales.isnan(), NAN_CODE)

    def load(self, codes: Tensor) -> Tensor:
        scales = _SCALE.from_codes(codes, torch.float32)
        return scales.masked_fill(codes == NAN_CODE, torch.nan)


def _scale_for(blocks: Tensor, target: float, common: Tensor | None) -> Tensor:
    """The scale under which the largest magnitude of each block becomes `target`; NaN where that is not finite."""
    assert common is not None
    amax = blocks.abs().amax(-1)
    wanted = (amax / target) / common.to(blocks.dtype)
    found = _SCALE.round(wanted.clamp_min(_SMALLEST))
    return torch.where(amax.isfinite(), found, torch.nan)
