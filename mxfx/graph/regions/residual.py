"""The residual axis: tensors that share it, and what writes and reads it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

import mxfx.ops  # noqa: F401  (registers the dialect)
from mxfx.graph.node import kind, op_name
from mxfx.graph.program import Program
from mxfx.graph.regions.ops import SAME, SCALINGS, SUMS, Refusal, place_of
from mxfx.ops.catalogue import multiplies

aten = torch.ops.aten

NORMS = ("rms_norm", "layer_norm")


@dataclass(frozen=True)
class AxisRegion:
    """All tensors that share one feature axis of ``width`` channels, from embedding to head.

    ``embeddings`` and ``writers`` (linears) produce the axis, ``readers`` (linears) contract it; a rotation of
    all of them is invisible outside, because sums and gainless RMSNorms commute with it. ``refusals`` name
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
    return [_region(tensors) for tensors in _axes(program, _carried)]


@dataclass(frozen=True)
class Stream:
    """The residual stream itself, in front of the norms that read it.

    ``writers`` are the embeddings and linears that it is a sum of, ``norms`` its readers. ``refusals`` name everything
    else that writes or reads it.
    """

    writers: tuple[fx.Node, ...]
    norms: tuple[fx.Node, ...]
    refusals: tuple[Refusal, ...]


def residual_streams(program: Program) -> list[Stream]:
    """The streams that an embedding writes to."""
    return [_stream(tensors) for tensors in _axes(program, _summed)]


def _axes(program: Program, carried: Callable[[fx.Node], list[fx.Node]]) -> list[list[fx.Node]]:
    """Tensors that share their last axis by what ``carried`` says of each, in graph order, an embedding among them."""
    # Slow to import, and reading a pipeline looks at no graph.
    import networkx as nx

    axes = nx.Graph()
    for node in program.graph.nodes:
        if width_of(node) is None:
            continue
        axes.add_node(node)
        axes.add_edges_from((source, node) for source in carried(node))
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    components = [sorted(c, key=order.__getitem__) for c in nx.connected_components(axes)]
    components.sort(key=lambda c: order[c[0]])
    return [c for c in components if any(kind(n) == "embedding" for n in c)]


def _region(tensors: list[fx.Node]) -> AxisRegion:
    members = set(tensors)
    readers = {u: None for t in tensors for u in t.users if multiplies(u, t)}
    norms = [t for t in tensors if kind(t) in NORMS]
    refusals = [Refusal(n, reason) for n in norms if (reason := _why_fixed(n)) is not None]
    for tensor in tensors:
        if kind(tensor) not in ("linear", "embedding") and not _carried(tensor):
            refusals.append(Refusal(tensor, f"{op_name(tensor)} writes to the axis and is no linear or embedding"))
        refusals.extend(
            Refusal(u, f"{op_name(u)} at {place_of(u)} reads single channels of the axis")
            for u in tensor.users
            if u not in readers and not (u in members and tensor in _carried(u)) and u.target is not aten.sym_size.int
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


def _why_fixed(norm: fx.Node) -> str | None:
    """Why a rotation does not commute with a norm; None if it does."""
    if kind(norm) == "layer_norm":
        return (
            f"the norm {place_of(norm)} subtracts the mean of its channels, which does not commute with a rotation "
            "(center-residual makes it an RMSNorm)"
        )
    if norm.args[1] is not None:
        return f"the norm {place_of(norm)} has a gain, which does not commute with a rotation"
    return None


def _stream(tensors: list[fx.Node]) -> Stream:
    members = set(tensors)
    writers = [t for t in tensors if not _summed(t)]
    readers = {u: None for t in tensors for u in t.users if not (u in members and t in _summed(u))}
    norms = [u for u in readers if kind(u) in NORMS]
    strangers = [u for u in readers if u not in norms and u.target is not aten.sym_size.int]
    return Stream(
        tuple(writers),
        tuple(norms),
        (
            *(
                Refusal(w, f"{op_name(w)} at {place_of(w)} writes to the residual and is no linear or embedding")
                for w in writers
                if kind(w) not in ("linear", "embedding")
            ),
            *(Refusal(u, f"{_named(u)} reads the residual without a norm") for u in strangers),
        ),
    )


def _named(node: fx.Node) -> str:
    return "the model's output" if node.op == "output" else f"{op_name(node)} at {place_of(node)}"


def _carried(node: fx.Node) -> list[fx.Node]:
    """The operands whose last axis is the last axis of ``node``, up to a rotation that commutes with the op."""
    return [node.args[0]] if kind(node) in NORMS else _summed(node)  # type: ignore[list-item]


def _summed(node: fx.Node) -> list[fx.Node]:
    """The operands whose channels ``node`` passes on, summed or scaled."""
    tensors = [a for a in node.args if isinstance(a, fx.Node) and not is_scalar(a)]
    if node.target in SUMS and len(tensors) == 2 and width_of(tensors[0]) == width_of(tensors[1]) == width_of(node):
        same_rank = tensors[0].meta["val"].dim() == tensors[1].meta["val"].dim()
        return tensors if same_rank else []
    if node.target in SCALINGS and len(tensors) == 1:
        # x / scalar and x * scalar; scalar / x is no scaling.
        return tensors if tensors[0] is node.args[0] or node.target is aten.mul.Tensor else []
    if node.target in SAME or is_idle_dropout(node):
        return [node.args[0]]  # type: ignore[list-item]
    if node.target is aten.reshape.default and width_of(tensors[0]) == width_of(node):
        # Rows are told apart otherwise; each keeps its channels.
        return tensors[:1]
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
