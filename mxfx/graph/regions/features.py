"""Features of a linear, followed through ops that move elements."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, fx

import mxfx.ops  # noqa: F401  (registers the dialect)
from mxfx.graph.regions.ops import MOVES, PROBE_BATCH, PROBE_SEQ, SAME, Refusal, place_of
from mxfx.graph.regions.residual import is_idle_dropout
from mxfx.ops.catalogue import spec, weights_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Features:
    """Where the features of a tensor come from: ``index[…]`` is a feature of ``source``, counted over its static axes.

    For a ``(batch, heads, seq, head_dim)`` view of a linear's output, ``index`` is ``(heads, head_dim)`` and holds
    output rows of that linear. ``path`` are the nodes between, ``source`` excluded.
    """

    source: fx.Node
    index: Tensor
    path: tuple[fx.Node, ...]


def features(node: fx.Node) -> Features | Refusal:
    """Follow ``node`` upwards through ops that only move or copy elements, and say which feature went where."""
    path: list[fx.Node] = []
    source = node
    while source.target in MOVES or source.target in SAME or is_idle_dropout(source):
        path.append(source)
        source = source.args[0]
    sizes = probe_sizes(source.graph)
    moved: object = _ids(source, sizes)
    for step in reversed(path):
        moved = _move(step, moved, sizes)
    assert isinstance(moved, Tensor)
    index = moved
    for axis in reversed(range(moved.dim())):
        if not isinstance(node.meta["val"].shape[axis], int):
            index = index.select(axis, 0)
    static = [i for i, size in enumerate(node.meta["val"].shape) if isinstance(size, int)]
    spread = index.reshape([moved.shape[i] if i in static else 1 for i in range(moved.dim())])
    if not torch.equal(spread.expand_as(moved), moved):
        return Refusal(node, f"{place_of(node)} mixes features of {place_of(source)} with batch or sequence")
    return Features(source, index, tuple(path))


def _ids(source: fx.Node, sizes: dict) -> Tensor:
    """Every feature of ``source`` labelled by its number, repeated over batch and sequence."""
    shape = source.meta["val"].shape
    static = [d if isinstance(d, int) else 1 for d in shape]
    ids = torch.arange(prod(static)).reshape(static)
    return ids.expand([concrete(d, sizes) for d in shape])


def _move(step: fx.Node, moved: object, sizes: dict) -> object:
    if step.target not in MOVES:
        return moved
    rest = fx.map_arg(step.args[1:], lambda n: concrete(n.meta["val"], sizes))
    if step.target is aten.view.default:
        return aten.reshape.default(moved, *rest)
    return step.target(moved, *rest, **step.kwargs)


def probe_sizes(graph: fx.Graph) -> dict:
    """The probe's sizes of the symbols behind batch and sequence."""
    ids = next(n for n in graph.nodes if n.op == "placeholder")
    return {
        dim.node.expr: size
        for dim, size in zip(ids.meta["val"].shape, (PROBE_BATCH, PROBE_SEQ), strict=True)
        if not isinstance(dim, int)
    }


def concrete(size: object, sizes: dict) -> int:
    return int(size) if isinstance(size, int) else int(size.node.expr.subs(sizes))


def is_matrix(product: fx.Node) -> bool:
    """Whether a product's weight is one matrix ``(out, in)``, of which single columns can be told apart."""
    source = weights_of(product).get("weight")
    return source is not None and source.meta["val"].dim() == 2 and spec(product).operand("weight").features == -2


def exclusive(found: Features, last_user: fx.Node) -> str | None:
    """Why somebody beside ``last_user`` sees the features that ``found`` covers; None if nobody does."""
    taken = set(found.index.flatten().tolist())
    for node in (found.source, *found.path):
        for user in node.users:
            if user in found.path or user is last_user:
                continue
            other = _covered(user, found.source)
            if other is None or taken & other:
                return f"{place_of(user)} reads {node.name} too"
    return None


def _covered(user: fx.Node, source: fx.Node) -> set[int] | None:
    """Features of ``source`` that a moving op passes on; None for an op that may read all of them."""
    if user.target not in MOVES or isinstance(user.meta.get("val"), list | tuple):
        return None
    found = features(user)
    if isinstance(found, Refusal) or found.source is not source:
        return None
    return set(found.index.flatten().tolist())
