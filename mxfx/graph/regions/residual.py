"""The residual axis: tensors that share it, and what writes and reads it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

import mxfx.ops  # noqa: F401  (registers the dialect)
from mxfx.graph.node import kind, op_name
from mxfx.graph.program import Program
from mxfx.graph.regions.ops import SAME, SCALINGS, SUMS, Refusal, place_of
from mxfx.ops.catalogue import multiplies

aten = torch.ops.aten


@dataclass(frozen=True)
class AxisRegion:
    """All tensors that share one feature axis of ``width`` channels, from embedding to head.

    ``embeddings`` and ``writers`` (linears) produce the axis, ``readers`` (linears) contract it; a rotation of
    all of them is invisible outside, because sums and gainless RMS norms commute with it. ``refusals`` name
    every node for which that does not hold.
    """

    width: int
    tensors: tuple[fx.Node, ...]
    embeddings: tuple[fx.Node, ...]
    writers: tuple[fx.Node, ...]
    readers: tuple[fx.Node, ...]
    norms: tuple[fx.Node, ...]
    refusals: tuple[Refusal, ...]


def residual_regions(program: Program) -> list[AxisRegion]:
    """The regions that an embedding writes to: one residual axis in every common decoder."""
    # Slow to import, and reading a pipeline looks at no graph.
    import networkx as nx

    axes = nx.Graph()
    for node in program.graph.nodes:
        if width_of(node) is None:
            continue
        axes.add_node(node)
        axes.add_edges_from((source, node) for source in _carried(node))
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    components = [sorted(c, key=order.__getitem__) for c in nx.connected_components(axes)]
    components.sort(key=lambda c: order[c[0]])
    return [_region(c) for c in components if any(kind(n) == "embedding" for n in c)]


def _region(tensors: list[fx.Node]) -> AxisRegion:
    members = set(tensors)
    readers = {u: None for t in tensors for u in t.users if multiplies(u, t)}
    norms = [t for t in tensors if kind(t) == "rms_norm"]
    refusals = [
        Refusal(n, f"the norm {place_of(n)} has a gain, which does not commute with a rotation")
        for n in norms
        if n.args[1] is not None
    ]
    for tensor in tensors:
        if kind(tensor) not in ("linear", "embedding") and not _carried(tensor):
            refusals.append(Refusal(tensor, f"{op_name(tensor)} writes to the axis and is no linear or embedding"))
        refusals.extend(
            Refusal(u, f"{op_name(u)} at {place_of(u)} reads single channels of the axis")
            for u in tensor.users
            if u not in readers and not (u in members and tensor in _carried(u))
        )
    return AxisRegion(
        width=width_of(tensors[0]) or 0,
        tensors=tuple(tensors),
        embeddings=tuple(t for t in tensors if kind(t) == "embedding"),
        writers=tuple(t for t in tensors if kind(t) == "linear"),
        readers=tuple(readers),
        norms=tuple(norms),
        refusals=tuple(refusals),
    )


def _carried(node: fx.Node) -> list[fx.Node]:
    """The operands whose last axis is the last axis of ``node``, up to a rotation that commutes with the op."""
    tensors = [a for a in node.args if isinstance(a, fx.Node) and not is_scalar(a)]
    if node.target in SUMS and len(tensors) == 2 and width_of(tensors[0]) == width_of(tensors[1]) == width_of(node):
        same_rank = tensors[0].meta["val"].dim() == tensors[1].meta["val"].dim()
        return tensors if same_rank else []
    if node.target in SCALINGS and len(tensors) == 1:
        # x / scalar and x * scalar; scalar / x is no scaling.
        return tensors if tensors[0] is node.args[0] or node.target is aten.mul.Tensor else []
    if node.target in SAME or is_idle_dropout(node) or kind(node) == "rms_norm":
        return [node.args[0]]  # type: ignore[list-item]
    return []


def width_of(node: fx.Node) -> int | None:
    """Size of a floating tensor's last axis where it is static, else None."""
    val = node.meta.get("val")
    if not isinstance(val, Tensor) or not val.is_floating_point() or val.dim() < 2 or node.op != "call_function":
        return None
    return val.shape[-1] if isinstance(val.shape[-1], int) else None


def is_scalar(operand: object) -> bool:
    if not isinstance(operand, fx.Node):
        return isinstance(operand, int | float)
    val = operand.meta.get("val")
    return isinstance(val, Tensor) and val.dim() == 0


def is_idle_dropout(node: fx.Node) -> bool:
    return node.target is aten.dropout.default and (node.args[1] == 0.0 or node.args[2] is False)
