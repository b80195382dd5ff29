"""Which operands a node writes, and whether that is sound.

A program is functional but for its caches: tensors that come in as inputs and that a node may write if its schema (or,
of a function, its attribute ``mutates``) says so. One node writes a cache; whoever else reads it stands behind.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import fx

from mxfx.graph.program import Program
from mxfx.ops import cache_bias
from mxfx.ops.catalogue import spec

_INPUTS = ("input_ids", "position_ids", "attention_mask")


def written(node: fx.Node) -> tuple[fx.Node, ...]:
    """The nodes whose values ``node`` writes; none for one that is told to only read (``writes=False``)."""
    if node.op != "call_function" or not (names := _mutated(node.target)):
        return ()
    given = spec(node).arguments()
    if given.get("writes") is False:
        return ()
    return tuple(value for name in names if isinstance(value := given.get(name), fx.Node))


def unsound_write(program: Program) -> tuple[fx.Node, str] | None:
    """The first node that writes what it may not, or reads before the writer, and what is wrong; None if all is well.

    (``cache_bias`` may stand before the writer: it looks at the size of a cache alone.)
    """
    writer: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        for cache in written(node):
            if cache.op != "placeholder" or cache.target in _INPUTS:
                return node, f"it writes {cache.name}, which is no cache that comes in as an input"
            if cache in writer:
                return node, f"it writes {cache.name}, which {writer[cache].name} writes too"
            writer[cache] = node
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    for cache, node in writer.items():
        early = next((u for u in cache.users if order[u] < order[node] and u.target is not cache_bias), None)
        if early is not None:
            return early, f"it reads {cache.name}, which {node.name} writes after it"
    return None


@lru_cache(maxsize=256)
def _mutated(target: object) -> tuple[str, ...]:
    if isinstance(target, torch._ops.OpOverload):
        return tuple(a.name for a in target._schema.arguments if a.alias_info is not None and a.alias_info.is_write)
    return tuple(getattr(target, "mutates", ()))
