"""``rotate-value`` (R2): values rotated per key-value head, absorbed by the linears around attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mxfx.algorithms.hadamard import hadamard_matrix, random_signs
from mxfx.graph.node import info, path_of
from mxfx.graph.program import Program
from mxfx.graph.regions import Refusal, ValueRegion, value_region
from mxfx.rewrite import ALL, Close, Context, Numerics, Pass, Rewriter, Selector, fact, register
from mxfx.rewrite.basis import change_columns, change_rows, why_shared

_NOTE = "value-basis"


@register
@dataclass(frozen=True)
class RotateValue(Pass):
    """Rotate values within each key-value head (QuaRot's R2, arXiv 2404.00456, §4.2); no op is added.

    Before::

        %o = linear(heads(attention(%q, %k, %v)), @Wo),  %v = linear(%x, @Wv, @bv)

    After::

        the same graph with  Rᵀ @Wv,  @bv R  and  @Wo R  head by head (a query head takes its key-value head's R)

    So the value cache and the output projection's input are rotated at once. ``block`` is the order of R within a
    head; 0 takes the whole head. ``signs`` draws random signs by seed.
    """

    name: ClassVar[str] = "rotate-value"
    requires: ClassVar[frozenset[str]] = frozenset({"raised"})
    provides: ClassVar[frozenset[str]] = frozenset({"values-rotated"})
    forbids: ClassVar[frozenset[str]] = frozenset({"weights-rounded", "activations-quantized", "kv-quantized"})
    numerics: ClassVar[Numerics] = Close(1e-9)
    block: int = 0
    signs: bool = True
    select: Selector = ALL

    def run(self, rw: Rewriter, ctx: Context) -> None:
        generator = ctx.generator("rotate-value")
        for attention in rw.program.nodes("attention"):
            if not self.select(path_of(attention)):
                continue
            region = value_region(attention)
            reason = region.reason if isinstance(region, Refusal) else _shared(rw, region)
            if reason is not None:
                rw.skip(attention, reason)
                continue
            assert isinstance(region, ValueRegion)
            if rw.match(attention, note=f"{path_of(region.value)} and {path_of(region.output)}"):
                rotate_values(rw, region, self._rotation(region, generator))
                for node in (region.value, region.output):
                    rw.set_info(node, info(node).with_note(_NOTE, path_of(attention)))

    def _rotation(self, region: ValueRegion, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """R and its inverse, float64 ``(kv_heads, blocks, block, block)``."""
        heads, width = region.rows.shape
        block = self.block or width
        if width % block:
            raise ValueError(f"rotate-value: block = {block} does not divide the head dimension {width}")
        rotation = hadamard_matrix(block, torch.float64).expand(heads, width // block, block, block)
        if self.signs:
            signs = random_signs(heads * width, generator, torch.float64)
            rotation = signs.reshape(heads, -1, block, 1) * rotation
        return rotation, rotation.mT


def rotate_values(rw: Rewriter, region: ValueRegion, basis: tuple[Tensor, Tensor]) -> None:
    """Put values into the basis ``v T``; ``basis`` is T and T⁻¹, each ``(kv_heads, blocks, block, block)``."""
    matrix, inverse = basis
    change_rows(rw, region.value, region.rows, matrix)
    change_columns(rw, region.output, region.columns, inverse.mT.repeat_interleave(region.group, 0))


def _shared(rw: Rewriter, region: ValueRegion) -> str | None:
    return why_shared(rw, region.value) or why_shared(rw, region.output)


@fact("values-rotated", "linears around attention agree on the basis of the values")
def values_rotated(program: Program) -> str | None:
    for attention in program.nodes("attention"):
        region = value_region(attention)
        if isinstance(region, Refusal):
            continue
        bases = [info(n).notes.get(_NOTE) for n in (region.value, region.output)]
        if bases[0] != bases[1]:
            return f"{path_of(region.value)} and {path_of(region.output)} are in different bases"
    return None
