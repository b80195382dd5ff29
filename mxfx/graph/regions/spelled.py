"""Softmax attention of a model's own: a call of SDPA, or two products of computed values around a softmax.

Every op between the products says what it does to the scores, so what is read is what is computed; an op that is not
in the table is a refusal.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

import mxfx.ops  # noqa: F401  (registers the dialect)
from mxfx.graph.fake import size_text, sizes_text
from mxfx.graph.node import operands
from mxfx.graph.regions.ops import Refusal
from mxfx.ops.catalogue import spec

aten = torch.ops.aten

_PRODUCTS = (aten.bmm.default, aten.matmul.default, aten.baddbmm.default)
_SOFTMAX = (aten.softmax.int, aten._softmax.default)
_SPLITS = (aten.reshape.default, aten.view.default)
_SAME = (torch.ops.mxfx.cast.default, aten.to.dtype, aten.clone.default)
_TIMES = (aten.mul.Tensor, aten.mul.Scalar)
_OVER = (aten.div.Tensor, aten.div.Scalar)
_WHERE = (aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther)
_AT_LEAST = (aten.max.other, aten.maximum.default, aten.clamp_min.default)
_FILLS = (aten.full.default, aten.new_full.default, aten.scalar_tensor.default)
_HEADS_REPEATED = (aten.reshape.default, aten.expand.default, aten.unsqueeze.default)
#: Scores of at most this are hidden: after the softmax nothing is left of them in any dtype.
_HIDDEN = -1e4
#: How many ops may lie between the softmax and a product.
_STEPS = 16


@dataclass(frozen=True)
class Term:
    """What is added to scores: ``factor`` times a value that broadcasts to ``(batch, heads, queries, keys)``.

    Where ``merged``, batch and heads are one axis of it, ``(batch * heads | 1, queries | 1, keys)``.
    """

    value: fx.Node
    factor: float = 1.0
    merged: bool = False


@dataclass(frozen=True)
class Spelled:
    """``softmax(c * tanh(scale * q @ k.mT / c) + terms, where allowed) @ v``, c being ``softcap``, or without one.

    ``q``, ``k`` and ``v`` are ``(batch, heads, tokens, width)``, heads not repeated; ``k`` is ``(batch, heads, width,
    tokens)`` where ``turned``. A score is hidden where a value of ``allowed`` is False, one of ``hidden`` True, or,
    where ``causal``, the key stands behind the query.
    """

    q: fx.Node
    k: fx.Node
    v: fx.Node
    turned: bool
    scale: float
    softcap: float | None = None
    terms: tuple[Term, ...] = ()
    allowed: tuple[fx.Node, ...] = ()
    hidden: tuple[fx.Node, ...] = ()
    causal: bool = False


def spelled(end: fx.Node) -> Spelled | Refusal | None:
    """The attention that ends in ``end``, its product with the values; None for a node that ends none."""
    if end.target is aten.scaled_dot_product_attention.default:
        return _called(end)
    if end.target not in _PRODUCTS[:2]:
        return None
    probs, values = end.args[:2]
    for _ in range(_STEPS):
        if not isinstance(probs, fx.Node) or probs.target not in (*_SAME, *_SPLITS):
            break
        probs = probs.args[0]
    if not isinstance(probs, fx.Node) or probs.target not in _SOFTMAX or not isinstance(values, fx.Node):
        return None
    found = _scores(probs.args[0], 0)
    if found is None:
        return None
    if isinstance(found, Refusal):
        return found
    if probs.args[1] not in (-1, probs.meta["val"].dim() - 1):
        return Refusal(probs, "its softmax does not run over the keys")
    v = _heads(values)
    if v is None:
        return Refusal(end, f"{values.name} is no (batch, heads, keys, width) value")
    return _checked(end, replace(found, v=unrepeated(v)))


def unrepeated(node: fx.Node) -> fx.Node:
    """A key or value before its heads were repeated by unsqueeze, expand and reshape; the node itself otherwise."""
    source, axis = node, None
    for target in _HEADS_REPEATED:
        if source.target is not target:
            return node
        axis = source.args[1]
        source = source.args[0]
    before, after = (sizes_text(n.meta["val"]) for n in (source, node))
    # A query's head reads key head ``i // repeats``: only what is repeated right behind the heads is that.
    kept = len(before) == len(after) == 4 and (before[0], *before[2:]) == (after[0], *after[2:])
    return source if kept and axis in (2, -3) else node


def _called(end: fx.Node) -> Spelled | Refusal:
    q, k, v, mask, dropout, causal, scale, _ = operands(end).values()
    if dropout:
        return Refusal(end, f"attention with dropout {dropout}")
    if mask is not None and causal:
        return Refusal(end, "a call with a mask and is_causal, of which torch takes one")
    scale = q.meta["val"].shape[-1] ** -0.5 if scale is None else scale
    found = Spelled(q, unrepeated(k), unrepeated(v), False, float(scale), causal=bool(causal))
    if mask is not None:
        boolean = mask.meta["val"].dtype == torch.bool
        found = replace(found, allowed=(mask,)) if boolean else replace(found, terms=(Term(mask),))
    return _checked(end, found)


def _checked(end: fx.Node, found: Spelled) -> Spelled | Refusal:
    shapes = [n.meta["val"].shape for n in (found.q, found.k, found.v)]
    q, k, v = (shape[1] for shape in shapes)
    if not all(isinstance(heads, int) for heads in (q, k, v)) or k != v or q % k:
        return Refusal(end, f"{q} query heads cannot share {k} key heads and {v} value heads")
    if len({size_text(shape[0]) for shape in shapes}) > 1:
        return Refusal(end, "queries, keys and values are of different batches")
    return found


def _scores(node: object, depth: int) -> Spelled | Refusal | None:
    """What scores are made of; None where they come from no product of computed values (``v`` is yet to be set)."""
    if not isinstance(node, fx.Node) or not isinstance(node.meta.get("val"), Tensor) or depth > _STEPS:
        return None
    if node.target in _PRODUCTS:
        return None if spec(node).product is not None else _product(node)
    if node.target in (aten.add.Tensor, aten.sub.Tensor):
        return _sum(node, depth)
    if node.target in _WHERE:
        condition, true, false = node.args
        if _number(true) is not None:
            return _masked(node, _scores(false, depth + 1), true, hidden=(condition,))
        return _masked(node, _scores(true, depth + 1), false, allowed=(condition,))
    if node.target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        source, hidden, fill = node.args
        return _masked(node, _scores(source, depth + 1), fill, hidden=(hidden,))
    source = node.args[0] if node.args else None
    found = _scores(source, depth + 1)
    if not isinstance(found, Spelled):
        return found
    if node.target in _SAME or (node.target in _SPLITS and _is_split(node)):
        return found
    if node.target in _AT_LEAST and _is_least(node.args[1]):
        return found
    if node.target in (*_TIMES, *_OVER):
        factor = _number(node.args[1]) or 0.0
        return _scaled(node, found, 1 / factor if factor and node.target in _OVER else factor)
    if node.target is aten.tanh.default and not (found.terms or found.allowed or found.hidden):
        return replace(found, softcap=1.0) if found.softcap is None else _unknown(node)
    return _unknown(node)


def _unknown(node: fx.Node) -> Refusal:
    return Refusal(node, f"scores pass through {node.target} at {node.name}, which attention does not express")


def _product(node: fx.Node) -> Spelled | Refusal:
    """``q @ k.mT``; what ``baddbmm`` adds is a term unless it is zero."""
    given = operands(node)
    *added, left, right = list(given.values())[: 3 if node.target is aten.baddbmm.default else 2]
    terms = [
        Term(one, float(given["beta"]), merged=one.meta["val"].dim() == 3)
        for one in added
        if given["beta"] and _number(one) != 0
    ]
    q, (keys, turned) = _heads(left), _keys(right)
    if q is None or keys is None:
        return Refusal(node, f"{node.name} multiplies no queries and keys of (batch, heads, tokens, width)")
    scale = float(given.get("alpha", 1.0))
    return Spelled(q, keys if turned else unrepeated(keys), q, turned, scale, None, tuple(terms))


def _keys(right: object) -> tuple[fx.Node | None, bool]:
    """Keys of four axes, and whether width still stands before tokens in them."""
    if not isinstance(right, fx.Node):
        return None, False
    if _swaps_last_two(right):
        return _heads(right.args[0]), False
    return (right, True) if right.meta["val"].dim() == 4 else (None, False)


def _swaps_last_two(node: fx.Node) -> bool:
    rank = node.meta["val"].dim()
    if node.target is aten.permute.default:
        return [int(axis) % rank for axis in node.args[1]] == [*range(rank - 2), rank - 1, rank - 2]
    axes = node.args[1:3] if node.target is aten.transpose.int else ()
    return {int(axis) % rank for axis in axes} == {rank - 2, rank - 1}


def _heads(value: object) -> fx.Node | None:
    """A value of four axes; one whose batch and heads were put together is taken before that was done."""
    while isinstance(value, fx.Node) and value.meta["val"].dim() == 3:
        source = value.args[0] if value.target in _SPLITS else None
        if not isinstance(source, fx.Node) or sizes_text(source.meta["val"])[-2:] != sizes_text(value.meta["val"])[-2:]:
            return None
        value = source
    return value if isinstance(value, fx.Node) and value.meta["val"].dim() == 4 else None


def _sum(node: fx.Node, depth: int) -> Spelled | Refusal | None:
    first, second = node.args[:2]
    plain = node.target is aten.add.Tensor and not node.kwargs and len(node.args) == 2
    for source, other in ((first, second), (second, first)):
        found = _scores(source, depth + 1)
        if isinstance(found, Spelled):
            if not plain or not isinstance(other, fx.Node) or other.meta["val"].dtype == torch.bool:
                return _unknown(node)
            merged = node.meta["val"].dim() == other.meta["val"].dim() == 3
            return replace(found, terms=(*found.terms, Term(other, merged=merged)))
        if isinstance(found, Refusal):
            return found
    return None


def _masked(
    node: fx.Node,
    found: Spelled | Refusal | None,
    fill: object,
    allowed: tuple[fx.Node, ...] = (),
    hidden: tuple[fx.Node, ...] = (),
) -> Spelled | Refusal | None:
    if not isinstance(found, Spelled):
        return found
    number = _number(fill)
    merged = any(mask.meta["val"].dim() == 3 for mask in (*allowed, *hidden)) and node.meta["val"].dim() == 3
    if number is None or number > _HIDDEN or merged:
        return _unknown(node)
    return replace(found, allowed=(*found.allowed, *allowed), hidden=(*found.hidden, *hidden))


def _scaled(node: fx.Node, found: Spelled, factor: float) -> Spelled | Refusal:
    if factor <= 0:
        return _unknown(node)
    terms = tuple(replace(term, factor=term.factor * factor) for term in found.terms)
    # f * c * tanh(s / c) is c' * tanh(s' / c') with c' = f * c and s' = f * s.
    softcap = None if found.softcap is None else found.softcap * factor
    return replace(found, scale=found.scale * factor, softcap=softcap, terms=terms)


def _is_split(node: fx.Node) -> bool:
    """Whether a reshape only takes batch and heads apart or puts them together."""
    after, before = (sizes_text(n.meta["val"]) for n in (node, node.args[0]))
    return after[-2:] == before[-2:] and {len(after), len(before)} <= {3, 4}


def _is_least(operand: object) -> bool:
    number = _number(operand)
    return number is not None and number <= torch.finfo(torch.bfloat16).min


def _number(operand: object) -> float | None:
    """A number, or the one that fills a tensor of any shape."""
    if isinstance(operand, int | float):
        return float(operand)
    if not isinstance(operand, fx.Node):
        return None
    if operand.target in _SAME:
        return _number(operand.args[0])
    if operand.target in _FILLS:
        given = operands(operand)
        return _number(given.get("fill_value", given.get("s")))
    return None
