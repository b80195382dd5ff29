"""Linears that read the same tensor."""

from __future__ import annotations

from torch import fx

import mxfx.ops  # noqa: F401  (registers the dialect)
from mxfx.graph.program import Program
from mxfx.ops.catalogue import spec


def siblings(program: Program) -> dict[fx.Node, list[fx.Node]]:
    """Distinct input node → the products with a weight that read it, in graph order."""
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in program.products():
        source = spec(node).node_of("input")
        if source is not None:
            found.setdefault(source, []).append(node)
    return found
