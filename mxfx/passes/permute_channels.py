"""``permute-channels``: hidden channels in an order that MX blocks like."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mxfx.algorithms.block_transform import zigzag_permutation
from mxfx.calibration.moments import block_moments
from mxfx.graph.regions import GatedRegion, Refusal, gated_regions
from mxfx.rewrite import ALL, Close, Context, Numerics, Pass, Rewriter, Selector, register
from mxfx.rewrite.basis import bias_of, change_input, why_shared
from mxfx.rewrite.facts import ACTIVATIONS_QUANTIZED, LOWERED, QUANTIZERS_FUSED, RAISED, WEIGHTS_ROUNDED, Fact


@register
@dataclass(frozen=True)
class PermuteChannels(Pass):
    """Reorder the hidden channels of gated activations, so that large channels spread over all blocks; no op is added.

    Before::

        %y = linear(silu(linear(%x, @Wg)) * linear(%x, @Wu), @Wd)

    After::

        the same graph with rows @Wg[p], @Wu[p] and columns @Wd[:, p]

    ``p`` deals channels, sorted by energy on the calibration tokens, to blocks of ``block`` in zigzag (DuQuant,
    arXiv 2406.01721, §3.2). Elementwise functions commute with any order.

    block: channels of a block of the format that is to come.
    """

    name: ClassVar[str] = "permute-channels"
    requires: ClassVar[frozenset[Fact]] = frozenset({RAISED})
    forbids: ClassVar[frozenset[Fact]] = frozenset({WEIGHTS_ROUNDED, ACTIVATIONS_QUANTIZED, LOWERED, QUANTIZERS_FUSED})
    numerics: ClassVar[Numerics] = Close(1e-9)
    block: int = 32
    select: Selector = ALL

    def run(self, rw: Rewriter, ctx: Context) -> None:
        regions: list[GatedRegion] = []
        for found in gated_regions(rw.program):
            node = found.node if isinstance(found, Refusal) else found.readers[0]
            if not self.select(node):
                continue
            reason = found.reason if isinstance(found, Refusal) else why_fixed(rw, found) or self._misfit(found)
            if reason is None:
                assert isinstance(found, GatedRegion)
                regions.append(found)
            else:
                rw.skip(node, reason)
        energy = block_moments(rw.program, {region.product: 1 for region in regions}, ctx)
        for region in regions:
            if rw.match(region.readers[0], note=f"{region.width} channels"):
                _permute(rw, region, zigzag_permutation(energy[region.product].flatten(), self.block))

    def _misfit(self, region: GatedRegion) -> str | None:
        return (
            f"block = {self.block} does not divide its {region.width} channels" if region.width % self.block else None
        )


def why_fixed(rw: Rewriter, region: GatedRegion) -> str | None:
    """Why a weight of the region may not change; None if all may."""
    linears = [*(w.linear for w in region.writers), *region.readers]
    return next((reason for n in linears if (reason := why_shared(rw, n)) is not None), None)


def _permute(rw: Rewriter, region: GatedRegion, order: Tensor) -> None:
    for reader in region.readers:
        change_input(rw, reader, lambda w: w[:, order.to(w.device)])
    for writer in region.writers:
        for name in (rw.program.weight_of(writer.linear), bias_of(writer.linear)):
            if name is not None:
                tensor = rw.weights[name].double().clone()
                tensor[writer.rows] = tensor[writer.rows[order]]
                rw.set_weight(name, tensor)
