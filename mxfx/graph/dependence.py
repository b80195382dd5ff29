"""Which values of a graph follow from those of some nodes: what only their sizes decide does not."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from mxfx.ops.catalogue import spec


def made_of(graph: fx.Graph, sources: Iterable[fx.Node]) -> set[fx.Node]:
    """``sources`` and every node that may have another value where theirs are others, of the same sizes."""
    found = set(sources)
    for node in graph.nodes:
        if any(source in found and reads(node, source) for source in node.all_input_nodes):
            found.add(node)
    return found


def reads(node: fx.Node, source: fx.Node) -> bool:
    """Whether a node reads values of one of its operands, and not only sizes, dtype or device."""
    return node.op != "call_function" or spec(node).reads(source)


def cone(nodes: Iterable[fx.Node], ends: Iterable[fx.Node]) -> list[fx.Node]:
    """Those of ``nodes``, in their order, that ``ends`` are computed from, the ends included."""
    wanted = set(ends)
    found = []
    for node in reversed(list(nodes)):
        if node in wanted:
            found.append(node)
            wanted |= set(node.all_input_nodes)
    return found[::-1]
