"""What the elements of a block share: the interface of every kind of scale.

A scale has a *step* for each block, by which the block's elements are multiplied, chosen from the block and from
what all blocks of the tensor have in common. `E8M0` (powers of two, nothing in common) and `E4M3` (NVFP4) are the
two there are; a third is a class like them and a name in `parse`.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Protocol

import torch
from torch import Tensor

from mxfx.formats.element import Element


class Scale(Protocol):
    """How blocks are scaled. Chosen scales are tensors of a kind that only their own class reads."""

    @property
    def rule(self) -> StrEnum:
        """How a block's scale follows from its entries."""

    @property
    def bits(self) -> int:
        """Stored bits of one block's scale."""

    def check(self, element: Element, block: int) -> None:
        """Raise `FormatError` if blocks of `block` such elements cannot have this scale."""

    def written(self, element: Element, block: int) -> str:
        """The canonical text of the format that this makes."""

    def common(self, x: Tensor, element: Element) -> Tensor | None:
        """What all blocks of the tensor `x` share, one number; None if nothing."""

    def choose(self, blocks: Tensor, element: Element, common: Tensor | None, precision: int = 53) -> Tensor:
        """The scale of each block.

        Args:
            blocks: (..., block) float32 or float64, ragged tails filled with zeros.
            common: what `common` gave, broadcasting against (...).
            precision: significant bits of an entry (8 for what was bfloat16); few may allow a faster way to the same
                result.
        """

    def candidates(self, blocks: Tensor, element: Element, common: Tensor | None, sweep: bool) -> Tensor:
        """Scales (k, ...) for a solver to try; the first is that of the rule, or one at which nothing saturates.

        `sweep` asks for every scale worth trying, else only for the rule's.
        """

    def round(self, blocks: Tensor, element: Element, common: Tensor | None, precision: int = 53) -> Tensor:
        """`blocks` on the grids of the scales that `choose` gives."""

    def steps(self, scales: Tensor, common: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(step, inverse) of each scale: what elements are multiplied by, and entries before they are rounded.

        A step is NaN for a block that holds NaN or Inf.
        """

    def store(self, scales: Tensor) -> Tensor:
        """Scales as stored codes, uint8."""

    def load(self, codes: Tensor) -> Tensor:
        """Scales of stored codes."""
