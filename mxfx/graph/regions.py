"""Which tensors share a feature axis, and which weights write and read it.

Everything here is found by dataflow: ops and shapes decide, never names of modules or families. A region that a
rewrite may not touch comes back as a ``Refusal`` (or carries refusals) that says which node is in the way and why.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor, fx

import mxfx.ops  # noqa: F401  (registers the dialect)
from mxfx.graph.node import kind, op_name, operands, path_of
from mxfx.graph.program import Program
from mxfx.ops.catalogue import multiplies, spec, weights_of

aten = torch.ops.aten

#: Ops that only move elements: what they do to a feature axis is read off by moving indices through them.
_MOVES = frozenset(
    {
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
        aten.transpose.int,
        aten.permute.default,
        aten.slice.Tensor,
        aten.select.int,
        aten.chunk.default,
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.unbind.int,
        aten.squeeze.dim,
        aten.unsqueeze.default,
        operator.getitem,
    }
)
#: Ops that return their first operand, element by element.
_SAME = frozenset({torch.ops.mxfx.cast.default, aten.clone.default, aten.to.dtype})
_SUMS = frozenset({aten.add.Tensor, aten.sub.Tensor})
_SCALINGS = frozenset({aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar})
_UNARY = frozenset(
    {
        aten.silu.default,
        aten.gelu.default,
        aten.relu.default,
        aten.sigmoid.default,
        aten.tanh.default,
        aten.pow.Tensor_Scalar,
        aten.square.default,
    }
)
_PROBE_BATCH, _PROBE_SEQ = 2, 3


@dataclass(frozen=True)
class Refusal:
    """A place that a rewrite must leave alone, and why."""

    node: fx.Node
    reason: str


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
        if _width(node) is None:
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
        Refusal(n, f"the norm {_where(n)} has a gain, which does not commute with a rotation")
        for n in norms
        if n.args[1] is not None
    ]
    for tensor in tensors:
        if kind(tensor) not in ("linear", "embedding") and not _carried(tensor):
            refusals.append(Refusal(tensor, f"{op_name(tensor)} writes to the axis and is no linear or embedding"))
        refusals.extend(
            Refusal(u, f"{op_name(u)} at {_where(u)} reads single channels of the axis")
            for u in tensor.users
            if u not in readers and not (u in members and tensor in _carried(u))
        )
    return AxisRegion(
        width=_width(tensors[0]) or 0,
        tensors=tuple(tensors),
        embeddings=tuple(t for t in tensors if kind(t) == "embedding"),
        writers=tuple(t for t in tensors if kind(t) == "linear"),
        readers=tuple(readers),
        norms=tuple(norms),
        refusals=tuple(refusals),
    )


def _carried(node: fx.Node) -> list[fx.Node]:
    """The operands whose last axis is the last axis of ``node``, up to a rotation that commutes with the op."""
    tensors = [a for a in node.args if isinstance(a, fx.Node) and not _is_scalar(a)]
    if node.target in _SUMS and len(tensors) == 2 and _width(tensors[0]) == _width(tensors[1]) == _width(node):
        same_rank = tensors[0].meta["val"].dim() == tensors[1].meta["val"].dim()
        return tensors if same_rank else []
    if node.target in _SCALINGS and len(tensors) == 1:
        # x / scalar and x * scalar; scalar / x is no scaling.
        return tensors if tensors[0] is node.args[0] or node.target is aten.mul.Tensor else []
    if node.target in _SAME or _is_idle_dropout(node) or kind(node) == "rms_norm":
        return [node.args[0]]  # type: ignore[list-item]
    return []


def _width(node: fx.Node) -> int | None:
    """Size of a floating tensor's last axis where it is static, else None."""
    val = node.meta.get("val")
    if not isinstance(val, Tensor) or not val.is_floating_point() or val.dim() < 2 or node.op != "call_function":
        return None
    return val.shape[-1] if isinstance(val.shape[-1], int) else None


def _is_scalar(operand: object) -> bool:
    if not isinstance(operand, fx.Node):
        return isinstance(operand, int | float)
    val = operand.meta.get("val")
    return isinstance(val, Tensor) and val.dim() == 0


def _is_idle_dropout(node: fx.Node) -> bool:
    return node.target is aten.dropout.default and (node.args[1] == 0.0 or node.args[2] is False)


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
    while source.target in _MOVES or source.target in _SAME or _is_idle_dropout(source):
        path.append(source)
        source = source.args[0]
    sizes = _sizes(source.graph)
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
        return Refusal(node, f"{_where(node)} mixes features of {_where(source)} with batch or sequence")
    return Features(source, index, tuple(path))


def _ids(source: fx.Node, sizes: dict) -> Tensor:
    """Every feature of ``source`` labelled by its number, repeated over batch and sequence."""
    shape = source.meta["val"].shape
    static = [d if isinstance(d, int) else 1 for d in shape]
    ids = torch.arange(prod(static)).reshape(static)
    return ids.expand([_concrete(d, sizes) for d in shape])


def _move(step: fx.Node, moved: object, sizes: dict) -> object:
    if step.target not in _MOVES:
        return moved
    rest = fx.map_arg(step.args[1:], lambda n: _concrete(n.meta["val"], sizes))
    if step.target is aten.view.default:
        return aten.reshape.default(moved, *rest)
    return step.target(moved, *rest, **step.kwargs)


def _sizes(graph: fx.Graph) -> dict:
    """The probe's sizes of the symbols behind batch and sequence."""
    ids = next(n for n in graph.nodes if n.op == "placeholder")
    return {
        dim.node.expr: size
        for dim, size in zip(ids.meta["val"].shape, (_PROBE_BATCH, _PROBE_SEQ), strict=True)
        if not isinstance(dim, int)
    }


def _concrete(size: object, sizes: dict) -> int:
    return int(size) if isinstance(size, int) else int(size.node.expr.subs(sizes))


def _is_matrix(product: fx.Node) -> bool:
    """Whether a product's weight is one matrix ``(out, in)``, of which single columns can be told apart."""
    source = weights_of(product).get("weight")
    return source is not None and source.meta["val"].dim() == 2 and spec(product).operand("weight").features == -2


def _exclusive(found: Features, last_user: fx.Node) -> str | None:
    """Why somebody beside ``last_user`` sees the features that ``found`` covers; None if nobody does."""
    taken = set(found.index.flatten().tolist())
    for node in (found.source, *found.path):
        for user in node.users:
            if user in found.path or user is last_user:
                continue
            other = _covered(user, found.source)
            if other is None or taken & other:
                return f"{_where(user)} reads {node.name} too"
    return None


def _covered(user: fx.Node, source: fx.Node) -> set[int] | None:
    """Features of ``source`` that a moving op passes on; None for an op that may read all of them."""
    if user.target not in _MOVES or isinstance(user.meta.get("val"), list | tuple):
        return None
    found = features(user)
    if isinstance(found, Refusal) or found.source is not source:
        return None
    return set(found.index.flatten().tolist())


@dataclass(frozen=True)
class ValueRegion:
    """Values from the linear that makes them, through attention, to the linear that contracts them.

    ``rows`` ``(kv_heads, head_dim)`` are output rows of ``value``; ``columns`` ``(heads, head_dim)`` are input columns
    of ``output``. Attention mixes tokens only, so any invertible matrix per key-value head commutes with it.
    """

    attention: fx.Node
    value: fx.Node
    rows: Tensor
    output: fx.Node
    columns: Tensor

    @property
    def group(self) -> int:
        """Query heads per key-value head."""
        return self.columns.shape[0] // self.rows.shape[0]


def value_region(attention: fx.Node) -> ValueRegion | Refusal:
    """The region of one attention node."""
    written = features(operands(attention)["v"])
    if isinstance(written, Refusal):
        return written
    if kind(written.source) != "linear" or written.index.dim() != 2:
        return Refusal(attention, f"its values come from {op_name(written.source)}, not straight from a linear")
    shared = _exclusive(written, attention)
    if shared is not None:
        return Refusal(attention, shared)
    output = _sole_reader(attention)
    if isinstance(output, Refusal) or spec(output).product is None or not _is_matrix(output):
        reason = output.reason if isinstance(output, Refusal) else f"its result goes to {op_name(output)}"
        return Refusal(attention, f"{reason}; expected one linear")
    contracted = spec(output).product
    assert contracted is not None
    read = features(spec(output).node_of(contracted.left))
    if isinstance(read, Refusal):
        return read
    heads, width = attention.meta["val"].shape[1], attention.meta["val"].shape[-1]
    columns = torch.argsort(read.index)
    if read.source is not attention or read.index.shape != (heads * width,):
        return Refusal(attention, f"{_where(output)} reads more or less than this attention's heads")
    return ValueRegion(attention, written.source, written.index, output, columns.reshape(heads, width))


def _sole_reader(node: fx.Node) -> fx.Node | Refusal:
    """The first node below ``node`` that does more than move elements, if there is exactly one."""
    while True:
        users = list(node.users)
        if len(users) != 1:
            return Refusal(node, f"{node.name} has {len(users)} readers")
        (user,) = users
        if user.target not in _MOVES and user.target not in _SAME and not _is_idle_dropout(user):
            return user
        node = user


@dataclass(frozen=True)
class RotaryRegion:
    """Queries and keys from their linears through RoPE to attention.

    ``query_rows`` ``(heads, head_dim)``, ``key_rows`` ``(kv_heads, head_dim)``. RoPE turns channels ``i`` and
    ``i + head_dim / 2`` together: only diagonals that are equal on both commute with it.
    """

    attention: fx.Node
    query: fx.Node
    query_rows: Tensor
    key: fx.Node
    key_rows: Tensor


def rotary_region(attention: fx.Node) -> RotaryRegion | Refusal:
    """The region of one attention node; refused where a norm, a partial rotation or another reader is in the way."""
    found = [_before_rope(operands(attention)[name], attention) for name in ("q", "k")]
    for side in found:
        if isinstance(side, Refusal):
            return side
    query, key = found
    return RotaryRegion(attention, query.source, query.index, key.source, key.index)


def _before_rope(node: fx.Node, attention: fx.Node) -> Features | Refusal:
    below = features(node)
    if isinstance(below, Refusal):
        return below
    rope = below.source
    if kind(rope) != "rope":
        return Refusal(attention, f"{node.name} comes from {op_name(rope)}, not from a whole rotary embedding")
    if len(rope.users) != 1 or any(len(n.users) != 1 for n in below.path):
        return Refusal(attention, f"{rope.name} has other readers than attention")
    above = features(rope.args[0])
    if isinstance(above, Refusal):
        return above
    if kind(above.source) != "linear" or above.index.dim() != 2:
        return Refusal(attention, f"{op_name(above.source)} stands between {rope.name} and its linear")
    shared = _exclusive(above, rope)
    return above if shared is None else Refusal(attention, shared)


@dataclass(frozen=True)
class Writer:
    """Output ``rows`` ``(width,)`` of a linear, in the order in which the region's axis lists them."""

    linear: fx.Node
    rows: Tensor


@dataclass(frozen=True)
class GatedRegion:
    """An axis of hidden channels between the linears that write it and those that read it.

    ``scaled`` enter the product linearly (``up``): a diagonal commutes. ``gates`` pass an elementwise function
    first (``silu(gate)``): only a permutation does. ``readers`` contract the axis (``down``).
    """

    product: fx.Node
    width: int
    scaled: tuple[Writer, ...]
    gates: tuple[Writer, ...]
    readers: tuple[fx.Node, ...]

    @cached_property
    def writers(self) -> tuple[Writer, ...]:
        return (*self.scaled, *self.gates)


def gated_regions(program: Program) -> Iterator[GatedRegion | Refusal]:
    """Every product or activation between linears, in graph order."""
    for node in program.graph.nodes:
        readers = [u for u in node.users if multiplies(u, node) and _is_matrix(u)]
        if readers and (node.target in _UNARY or node.target is aten.mul.Tensor):
            yield _gated(node, readers)


def _gated(product: fx.Node, readers: list[fx.Node]) -> GatedRegion | Refusal:
    strangers = [u for u in product.users if u not in readers]
    if strangers:
        return Refusal(product, f"{_where(strangers[0])} reads {product.name} and is no linear")
    found = list(_writers(product, linear=True))
    refused = next((w for w in found if isinstance(w, Refusal)), None)
    if refused is not None:
        return refused
    scaled = tuple(w for w, linear in found if linear)  # type: ignore[misc]
    gates = tuple(w for w, linear in found if not linear)  # type: ignore[misc]
    return GatedRegion(product, _width(product) or 0, scaled, gates, tuple(readers))


def _writers(node: fx.Node, linear: bool) -> Iterator[tuple[Writer, bool] | Refusal]:
    if node.target in _UNARY:
        yield from _below(node, node.args[0], False)
    elif node.target is aten.mul.Tensor and not any(_is_scalar(a) for a in node.args):
        for operand in node.args:
            yield from _below(node, operand, linear)
    else:
        yield Refusal(node, f"{op_name(node)} at {_where(node)} is no elementwise function of linears")


def _below(user: fx.Node, operand: object, linear: bool) -> Iterator[tuple[Writer, bool] | Refusal]:
    assert isinstance(operand, fx.Node)
    if operand.target in _UNARY or operand.target is aten.mul.Tensor:
        if len(operand.users) != 1:
            yield Refusal(operand, f"{operand.name} has {len(operand.users)} readers")
            return
        yield from _writers(operand, linear)
        return
    found = features(operand)
    if isinstance(found, Refusal):
        yield found
        return
    if kind(found.source) != "linear" or found.index.dim() != 1:
        yield Refusal(user, f"{operand.name} comes from {op_name(found.source)} at {_where(found.source)}, no linear")
        return
    shared = _exclusive(found, user)
    yield (Writer(found.source, found.index), linear) if shared is None else Refusal(user, shared)


def siblings(program: Program) -> dict[fx.Node, list[fx.Node]]:
    """Distinct input node → the products with a weight that read it, in graph order."""
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in program.products():
        source = spec(node).node_of("input")
        if source is not None:
            found.setdefault(source, []).append(node)
    return found


def _where(node: fx.Node) -> str:
    return path_of(node) or node.name
