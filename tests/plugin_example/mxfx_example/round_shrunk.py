"""``round-shrunk``: rounding to nearest of slightly smaller weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from mxfx.graph.node import info
from mxfx.ops.catalogue import weights_of
from mxfx.rewrite import ALL, Lossy, NodePass, Numerics, Rewriter, Selector
from mxfx.rewrite.facts import ANNOTATED, WEIGHTS_ROUNDED, Fact
from mxfx.rewrite.operands import mark_rounded


@dataclass(frozen=True)
class RoundShrunk(NodePass):
    """Round the weights of ``linear_add`` after a multiplication that keeps the largest of a block on the grid.

    Before::

        @w : bf16[out, in]      {weight: mxint4@32}

    After::

        @w : round(factor * w)

    factor: what weights are multiplied by first.
    """

    name: ClassVar[str] = "round-shrunk"
    kinds: ClassVar[tuple[str, ...]] = ("linear_add",)
    requires: ClassVar[frozenset[Fact]] = frozenset({ANNOTATED})
    provides: ClassVar[frozenset[Fact]] = frozenset({WEIGHTS_ROUNDED})
    numerics: ClassVar[Numerics] = Lossy()
    factor: float = 0.98
    select: Selector = ALL

    def refuse(self, rw: Rewriter, node: fx.Node) -> str | None:
        return None if "weight" in info(node).formats else "its weight carries no format"

    def rewrite(self, rw: Rewriter, node: fx.Node) -> None:
        name = str(weights_of(node)["weight"].target)
        fmt = info(node).formats["weight"].format
        rw.set_weight(name, fmt.fake_quantize(self.factor * rw.weights.master(name)))
        mark_rounded(rw, node, "weight")
