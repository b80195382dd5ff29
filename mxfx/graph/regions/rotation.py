"""Rotary embeddings, told by what they compute: channels of a value turned in pairs, however the graph spells it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, fx

import mxfx.ops  # noqa: F401  (registers the dialect)
from mxfx.graph.program import Program
from mxfx.graph.regions.features import concrete, probe_sizes
from mxfx.graph.regions.ops import MOVES, SAME, Refusal
from mxfx.ops.rope import rope

aten = torch.ops.aten

_JOINS = frozenset({aten.cat.default, aten.stack.default})
_TERMS = frozenset({aten.add.Tensor, aten.sub.Tensor})
_TURNS = frozenset({*MOVES, *SAME, *_JOINS, aten.neg.default})
#: What may lie between cosines and the products that they enter.
_SPREADS = frozenset({*MOVES, *_JOINS, aten.repeat_interleave.self_int, aten.expand.default})

Layout = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Rotation:
    """A node that computes ``rope`` of ``x`` in another layout; all three are nodes before it.

    ``x`` is ``(batch, heads, seq, width)``, or ``(batch, seq, heads, width)`` where ``tokens_first``; ``cos`` and
    ``sin`` are ``(batch | 1, seq, ·)``. ``pairs_in`` and ``pairs_out`` say that channels ``2i`` and ``2i + 1`` turn
    together there, not ``i`` and ``i + width / 2``. ``angles``: ``whole`` (one a channel, as in ``rope``), ``half``
    (one a pair of channels), ``pairs`` (one a channel, in pairs), ``first`` (one a channel, of which the first half is
    used for pairs). ``backwards`` turns the other way round.
    """

    x: fx.Node
    cos: fx.Node
    sin: fx.Node
    tokens_first: bool
    pairs_in: bool
    pairs_out: bool
    angles: str
    backwards: bool


def text_nodes(program: Program) -> frozenset[fx.Node]:
    """Values that depend on products with weights, or on heads that come from outside: queries and keys do, angles do
    not.
    """
    found: set[fx.Node] = set()
    products = set(program.products())
    for node in program.graph.nodes:
        heads = node.op == "placeholder" and node.meta["val"].dim() == 4
        if node in products or heads or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return frozenset(found)


def is_rotary(node: fx.Node) -> bool:
    """Whether a node could end a rotary embedding: a sum of two products, or such sums put together."""
    if node.target is aten.add.Tensor:
        products = _products(node)
        return products is not None and any(_is_turned(source) for one in products for source in one.all_input_nodes)
    return node.target in _JOINS and len(list(_sums(node))) == len(node.all_input_nodes) == 2


def rotation(root: fx.Node, text: frozenset[fx.Node]) -> Rotation | Refusal:
    """What ``root`` turns, and how; ``text`` is ``text_nodes`` of its program."""
    factors = [source for one in _all_products(root) for source in one.args[:2]]
    values = [f for f in factors if f in text]
    spread = [_table(f) for f in factors if isinstance(f, fx.Node) and f not in text]
    angles = list(dict.fromkeys(a for a in spread if a is not None))
    if len(values) * 2 != len(factors) or None in spread or len(angles) != 2:
        return Refusal(root, "its products are not of a value with cosines and sines (batch, seq, channels)")
    x = _common(values)
    if x is None:
        return Refusal(root, "what it turns is no one value of four axes")
    for cos, sin in (angles, angles[::-1]):
        found = _read(root, x, cos, sin)
        if found is not None:
            return found
    return Refusal(root, f"it turns no channels of {x.name}, in halves or in pairs, each with one other")


def in_pairs(x: Tensor) -> Tensor:
    """Channels ``0, 2, 4, … 1, 3, 5, …``: pairs that lie side by side, put into halves."""
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def from_halves(x: Tensor) -> Tensor:
    """The inverse of ``in_pairs``."""
    return x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


def _products(node: object) -> list[fx.Node] | None:
    """The two products that a sum or a difference adds."""
    if not isinstance(node, fx.Node) or node.target not in _TERMS or len(node.args) != 2:
        return None
    found = [a for a in node.args if isinstance(a, fx.Node) and a.target is aten.mul.Tensor]
    return found if len(found) == 2 else None


def _sums(join: fx.Node) -> Iterator[fx.Node]:
    """The sums of products that a node puts together, through views of single channels."""
    for source in join.all_input_nodes:
        while source.target in (aten.unsqueeze.default,):
            source = source.args[0]
        if _products(source) is not None:
            yield source


def _all_products(root: fx.Node) -> list[fx.Node]:
    return [one for term in ([root] if _products(root) else _sums(root)) for one in _products(term) or ()]


def _is_turned(node: fx.Node) -> bool:
    while node.target in _TURNS and node.target not in _JOINS:
        node = node.args[0]
    return node.target in _JOINS


def _table(node: fx.Node) -> fx.Node | None:
    """The nearest table ``(batch, seq, channels)`` behind a factor."""
    while not isinstance(node.meta["val"], Tensor) or node.meta["val"].dim() != 3:
        if node.target not in _SPREADS:
            return None
        node = node.all_input_nodes[0]
    return node


def _common(values: Iterable[fx.Node]) -> fx.Node | None:
    """The latest value of four axes that all ``values`` are made of, by moving and negating channels."""
    shared: set[fx.Node] | None = None
    for value in values:
        reached, queue = {value}, [value]
        while queue:
            node = queue.pop()
            sources = set(node.all_input_nodes) - reached if node.target in _TURNS else set()
            reached |= sources
            queue.extend(sources)
        shared = reached if shared is None else shared & reached
    found = [n for n in shared or () if isinstance(n.meta.get("val"), Tensor) and n.meta["val"].dim() == 4]
    return max(found, default=None)


def _read(root: fx.Node, x: fx.Node, cos: fx.Node, sin: fx.Node) -> Rotation | None:
    """The first reading of ``root`` that gives its numbers."""
    sizes = probe_sizes(root.graph)
    generator = torch.Generator().manual_seed(0)
    shapes = [[concrete(size, sizes) for size in n.meta["val"].shape] for n in (x, cos, sin)]
    # Integers: every reading that is right is right to the bit.
    given = [torch.randint(-99, 99, shape, generator=generator).double() for shape in shapes]
    try:
        expected = _evaluate(root, dict(zip((x, cos, sin), given, strict=True)), sizes)
    except LookupError:
        return None
    heads, width = x.meta["val"].shape[1], given[0].shape[-1]
    kinds = {width: ("whole", "pairs", "first"), width // 2: ("half",)}.get(given[1].shape[-1], ())
    if width % 2 or expected.numel() != given[0].numel() or given[1].shape != given[2].shape:
        return None
    for pairs, angles, backwards in product(((False, False), (True, True), (True, False)), kinds, (False, True)):
        reading = Rotation(x, cos, sin, not isinstance(heads, int), *pairs, angles, backwards)
        if torch.equal(computed(reading, *given).reshape(expected.shape), expected):
            return reading
    return None


def computed(reading: Rotation, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """What a reading says that its node computes."""
    tables = [_WIDENED[reading.angles](table) for table in (cos, -sin if reading.backwards else sin)]
    x = x.transpose(1, 2) if reading.tokens_first else x
    y = rope(in_pairs(x) if reading.pairs_in else x, *tables)
    y = from_halves(y) if reading.pairs_out else y
    return y.transpose(1, 2) if reading.tokens_first else y


_WIDENED: dict[str, Layout] = {
    "whole": lambda table: table,
    "half": lambda table: torch.cat((table, table), -1),
    "pairs": lambda table: torch.cat((table[..., ::2], table[..., 1::2]), -1),
    "first": lambda table: torch.cat((table[..., : table.shape[-1] // 2],) * 2, -1),
}


def _evaluate(root: fx.Node, known: dict[fx.Node, Tensor], sizes: dict) -> Tensor:
    """The value of ``root`` for values of nodes before it. Raises ``LookupError`` where it depends on others."""

    def value(node: fx.Node) -> object:
        if node not in known:
            if node.op != "call_function" or node.target not in (_TURNS | _SPREADS | _TERMS | {aten.mul.Tensor}):
                if isinstance(node.meta.get("val"), int | torch.SymInt):
                    return concrete(node.meta["val"], sizes)
                raise LookupError(node.name)
            args, kwargs = fx.map_arg((node.args, node.kwargs), value)
            target = aten.reshape.default if node.target is aten.view.default else node.target
            known[node] = target(*args, **kwargs)
        return known[node]

    found = value(root)
    assert isinstance(found, Tensor)
    return found
