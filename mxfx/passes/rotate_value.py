"""``rotate-value`` (R2): values rotated per key-value head, absorbed by the linears around attention."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mxfx.algorithms.hadamard import fitting_order, hadamard_matrix, order_words, random_signs
from mxfx.graph.node import path_of
from mxfx.graph.program import Program
from mxfx.graph.regions import Refusal, ValueRegion, value_region
from mxfx.rewrite import ALL, Close, Context, Numerics, Pass, Rewriter, Selector, register
from mxfx.rewrite.basis import change_columns, change_rows, why_shared
from mxfx.rewrite.facts import (
    ACTIVATIONS_QUANTIZED,
    KV_QUANTIZED,
    LOWERED,
    RAISED,
    VALUES_ROTATED,
    WEIGHTS_ROUNDED,
    Fact,
    Selected,
)


@register
@dataclass(frozen=True)
class RotateValue(Pass):
    """Rotate values within each key-value head (QuaRot's R2, arXiv 2404.00456, §4.2); no op is added.

    Before::

        %o = linear(heads(attention(%q, %k, %v)), @Wo),  %v = linear(%x, @Wv, @bv)

    After::

        the same graph with  Rᵀ @Wv,  @bv R  and  @Wo R  head by head (a query head takes its key-value head's R)

    So the value cache and the output projection's input are rotated at once. ``block`` is the order of R within a
    head, or the largest that divides it and the head; 0 takes the whole head. ``signs`` draws random signs by seed.

    block: order of the rotation within a head, or the largest that divides it and the head; 0 for the whole head.
    signs: draw random signs by the run's seed.
    """

    name: ClassVar[str] = "rotate-value"
    requires: ClassVar[frozenset[Fact]] = frozenset({RAISED})
    provides: ClassVar[frozenset[Fact]] = frozenset({VALUES_ROTATED})
    forbids: ClassVar[frozenset[Fact]] = frozenset({WEIGHTS_ROUNDED, ACTIVATIONS_QUANTIZED, KV_QUANTIZED, LOWERED})
    numerics: ClassVar[Numerics] = Close(1e-9)
    block: int = 0
    signs: bool = True
    select: Selector = ALL

    def run(self, rw: Rewriter, ctx: Context) -> None:
        generator = ctx.generator("rotate-value")
        for attention in rw.program.nodes("attention"):
            if not self.select(attention):
                continue
            region = value_region(attention)
            reason = region.reason if isinstance(region, Refusal) else _shared(rw, region)
            if reason is not None:
                rw.skip(attention, reason)
                continue
            assert isinstance(region, ValueRegion)
            width = region.rows.shape[1]
            order = fitting_order(width, self.block)
            if order is None:
                rw.skip(attention, f"no Hadamard matrix of order {self.block or width} fits the head dimension {width}")
                continue
            between = f"{path_of(region.value)} and {path_of(region.output)}"
            if rw.match(attention, note=f"{between}, order {order_words(width, self.block, order)}"):
                rotate_values(rw, region, self._rotation(region, generator))

    def _rotation(self, region: ValueRegion, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """R and its inverse, float64 ``(kv_heads, blocks, block, block)``."""
        heads, width = region.rows.shape
        block = fitting_order(width, self.block)
        assert block is not None
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


@VALUES_ROTATED.means
def values_rotated(program: Program, selected: Selected) -> str | None:
    return turned_alone(program, selected, RotateValue.name)


def turned_alone(program: Program, selected: Selected, pass_name: str) -> str | None:
    """Where a pass, by the ledger, changed the linear that writes values and not the one that reads them, or so."""
    for attention in filter(selected, program.nodes("attention")):
        region = value_region(attention)
        if isinstance(region, Refusal):
            continue
        counts = Counter(change.weight for change in program.weights.ledger if change.pass_name == pass_name)
        homes = (program.weights.canonical(program.weight_of(node)) for node in (region.value, region.output))
        changes = [counts[home] for home in homes]
        if changes[0] != changes[1]:
            return (
                f"{pass_name} changed {path_of(region.value)} {changes[0]} times, "
                f"{path_of(region.output)} {changes[1]} times: they are in different bases"
            )
    return None
