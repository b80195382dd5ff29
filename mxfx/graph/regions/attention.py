"""What lies between the projections and attention: values, rotated queries and keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

import mxfx.ops  # noqa: F401  (registers the dialect)
from mxfx.graph.node import kind, op_name, operands
from mxfx.graph.regions.features import Features, exclusive, features, is_matrix
from mxfx.graph.regions.ops import MOVES, SAME, Refusal, place_of
from mxfx.graph.regions.residual import is_idle_dropout
from mxfx.ops.catalogue import spec


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
    shared = exclusive(written, attention)
    if shared is not None:
        return Refusal(attention, shared)
    output = _sole_reader(attention)
    if isinstance(output, Refusal) or spec(output).product is None or not is_matrix(output):
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
        return Refusal(attention, f"{place_of(output)} reads more or less than this attention's heads")
    return ValueRegion(attention, written.source, written.index, output, columns.reshape(heads, width))


def _sole_reader(node: fx.Node) -> fx.Node | Refusal:
    """The first node below ``node`` that does more than move elements, if there is exactly one."""
    while True:
        users = list(node.users)
        if len(users) != 1:
            return Refusal(node, f"{node.name} has {len(users)} readers")
        (user,) = users
        if user.target not in MOVES and user.target not in SAME and not is_idle_dropout(user):
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
    shared = exclusive(above, rope)
    return above if shared is None else Refusal(attention, shared)
