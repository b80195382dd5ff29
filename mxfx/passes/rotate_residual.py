"""``rotate-residual`` (R1): an orthogonal change of basis of the residual stream, absorbed by weights."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mxfx.algorithms.block_transform import apply_blocks
from mxfx.algorithms.hadamard import hadamard_matrix, random_signs
from mxfx.graph.node import info
from mxfx.graph.program import Program
from mxfx.graph.regions import AxisRegion, residual_regions
from mxfx.rewrite import Close, Context, Numerics, Pass, Rewriter, register
from mxfx.rewrite.basis import change_input, change_output, why_shared
from mxfx.rewrite.facts import (
    ACTIVATIONS_QUANTIZED,
    KV_QUANTIZED,
    LOWERED,
    NORMS_FUSED,
    RAISED,
    RESIDUAL_ROTATED,
    WEIGHTS_ROUNDED,
    Fact,
    Selected,
)

_NOTE = "residual-basis"


@register
@dataclass(frozen=True)
class RotateResidual(Pass):
    """Rotate the residual axis by R (QuaRot's R1, arXiv 2404.00456, §4.1); no op is added.

    Before::

        %h = embedding(@E); %h' = %h + linear(%a, @Wo, @b); %y = linear(rms_norm(%h', None), @W)

    After::

        the same graph with  @E R,  Rᵀ @Wo,  @b R,  @W R

    ``block-hadamard`` keeps R within blocks of ``block`` channels, so that MX blocks at the linears' inputs are rotated
    and large channels stay where they are; ``hadamard`` mixes the whole axis. ``signs`` draws random signs by seed.
    A residual axis that meets a gain or an elementwise op is refused.

    kind: a rotation within blocks, or one of the whole axis.
    block: channels of a block, for block-hadamard.
    signs: draw random signs by the run's seed.
    """

    name: ClassVar[str] = "rotate-residual"
    requires: ClassVar[frozenset[Fact]] = frozenset({RAISED, NORMS_FUSED})
    provides: ClassVar[frozenset[Fact]] = frozenset({RESIDUAL_ROTATED})
    forbids: ClassVar[frozenset[Fact]] = frozenset({WEIGHTS_ROUNDED, ACTIVATIONS_QUANTIZED, KV_QUANTIZED, LOWERED})
    numerics: ClassVar[Numerics] = Close(1e-9)
    kind: Literal["hadamard", "block-hadamard"] = "block-hadamard"
    block: int = 32
    signs: bool = True

    def run(self, rw: Rewriter, ctx: Context) -> None:
        for region in residual_regions(rw.program):
            place = region.embeddings[0]
            if region.refusals:
                rw.skip(place, "; ".join(dict.fromkeys(r.reason for r in region.refusals[:3])))
                continue
            reason = _shared(rw, region)
            if reason is not None:
                rw.skip(place, reason)
            elif rw.match(
                place, note=f"{region.width} channels, {len(region.writers)} writers, {len(region.readers)} readers"
            ):
                self._rotate(rw, region, ctx)

    def _rotate(self, rw: Rewriter, region: AxisRegion, ctx: Context) -> None:
        rotation = self._matrix(region.width, ctx)
        change = partial(_rotated, rotation=rotation)
        seen: set[str] = set()
        for node in (*region.embeddings, *region.readers):
            home = rw.weights.canonical(rw.program.weight_of(node))
            if home not in seen:
                seen.add(home)
                change_input(rw, node, change)
        for node in region.writers:
            change_output(rw, node, change)
        label = f"{self.kind} {rotation.shape[-1]}"
        for node in (*region.embeddings, *region.readers, *region.writers):
            rw.set_info(node, info(node).with_note(_NOTE, label))

    def _matrix(self, width: int, ctx: Context) -> Tensor:
        """R as float64 blocks ``(width / block, block, block)``."""
        block = width if self.kind == "hadamard" else self.block
        if width % block:
            raise ValueError(f"rotate-residual: block = {block} does not divide the residual axis of {width} channels")
        hadamard = hadamard_matrix(block, torch.float64).expand(width // block, block, block)
        if not self.signs:
            return hadamard
        signs = random_signs(width, ctx.generator("rotate-residual"), torch.float64)
        return signs.reshape(-1, block, 1) * hadamard


def _rotated(x: Tensor, rotation: Tensor) -> Tensor:
    return apply_blocks(x, rotation)


def _shared(rw: Rewriter, region: AxisRegion) -> str | None:
    """Why a weight of the region may not change: a node outside reads it too, or one on another side of it."""
    columns = frozenset({*region.embeddings, *region.readers})
    reasons = [why_shared(rw, n, columns) for n in (*region.embeddings, *region.readers)]
    reasons += [why_shared(rw, n) for n in region.writers]
    return next((r for r in reasons if r is not None), None)


@RESIDUAL_ROTATED.means
def residual_rotated(program: Program, selected: Selected) -> str | None:
    for region in residual_regions(program):
        bases = {str(info(n).notes.get(_NOTE)): n for n in (*region.embeddings, *region.readers, *region.writers)}
        if len(bases) > 1:
            return f"{' and '.join(f'{n.name} is in basis {b}' for b, n in list(bases.items())[:2])}"
    return None
