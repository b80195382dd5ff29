"""What a pass of a pipeline with phases takes from the other phase, where the two agree."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from mxfx.graph.node import info
from mxfx.graph.program import Program
from mxfx.rewrite.operands import is_rounded, mark_rounded
from mxfx.rewrite.rewriter import Rewriter
from mxfx.rewrite.selector import Selector


def any_weight(program: Program | None, select: Selector) -> bool:
    """Whether a product that ``select`` matches has a weight that is to be in a format."""
    products = () if program is None else program.products()
    return any(select(node) and "weight" in info(node).formats for node in products)


def take_over(rw: Rewriter, peer: Program | None, nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """Give nodes the weights that the other phase's program has on the grid of the same format; the rest is returned.

    Both programs were one until ``annotate``, so that a node and its weight are called alike in both.
    """
    theirs = {} if peer is None else {node.name: node for node in peer.products() if is_rounded(node, "weight")}
    rest = []
    for node in nodes:
        other, fmt = theirs.get(node.name), info(node).formats["weight"].format
        if peer is None or other is None or info(other).formats["weight"].format != fmt:
            rest.append(node)
        elif rw.match(node, note=f"{fmt}, as in the other phase"):
            rw.set_weight(rw.program.weight_of(node), peer.weights[peer.weight_of(other)])
            mark_rounded(rw, node, "weight")
    return rest
