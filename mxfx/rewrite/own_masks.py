"""Masks and biases of a model's own making, as functions of padding and places: what they are over a whole cache.

A model computes them for the tokens of one call. With a cache they are computed for all tokens that it holds, from the
tokenizer's mask over them, and the rows of the new tokens are taken.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.ops import aten

from mxfx.graph.execute import call, runtime_weight
from mxfx.graph.node import kind, op_name
from mxfx.graph.program import NOMINAL_MODEL
from mxfx.rewrite.rewriter import Rewriter

#: Ops that read of the ids no more than how many there are and where they lie.
_SIZES = frozenset({"arange", "places", "position_mask", "real_tokens"})
_LIKE = frozenset(f"aten.new_{what}.default" for what in ("empty", "full", "ones", "zeros"))
#: Why a table on the meta device says nothing of a mask.
UNREAD = "whose numbers have not been read"
#: What is at most so much hides a key where scores lie close to each other.
_FAR = -1e3
#: Tokens of the text on which a mask shows whether it hides later ones: more than a window or a chunk of a tiny model.
_SHOWN = 24


def _least() -> float:
    """What is at most so much hides a key whatever its score."""
    return torch.finfo(NOMINAL_MODEL).min / 2


class OwnMasks:
    """What attention of one program is given beside the tokenizer's mask."""

    def __init__(self, rw: Rewriter) -> None:
        self._rw = rw
        inputs = {n.target: n for n in rw.graph.nodes if n.op == "placeholder"}
        self._ids, self._mask = inputs["input_ids"], inputs["attention_mask"]
        self._known: dict[fx.Node, fx.Node] = {}
        self._taken: dict[fx.Node, fx.Node] = {}
        self._tokens: fx.Node | None = None

    def makers(self, values: list[fx.Node]) -> set[fx.Node]:
        """The nodes that only help to make ``values``."""
        found = {n for value in values for n in self._closure(value)}
        for node in reversed(self._rw.graph.nodes):
            if node in found and any(user not in found and kind(user) != "attention" for user in node.users):
                found.discard(node)
        return found

    def refused(self, value: fx.Node) -> str | None:
        """Why a value cannot be made for the tokens of a cache; None if it can."""
        for node in self._closure(value):
            if kind(node) == "positions":
                return f"{value.name} depends on position ids, of which a call gives those of new tokens alone"
            if node.target is aten.sym_size.int:
                if self._axis(node) is None:
                    return f"{value.name} depends on a size that is neither the batch's nor the text's"
            elif self._ids in node.all_input_nodes and not (kind(node) in _SIZES or op_name(node) in _LIKE):
                return f"{value.name} depends on what the tokens are, which no cache holds"
        return None

    def rows(self, value: fx.Node, slots: fx.Node, like: fx.Node) -> fx.Node:
        """``value`` for the queries at ``slots`` and all tokens of a cache."""
        whole = self._made(value, like)
        return self._at(whole, slots, like) if _by_query(whole) else whole

    def _at(self, node: fx.Node, slots: fx.Node, like: fx.Node) -> fx.Node:
        """The rows of ``node`` at ``slots``, taken of what it is computed from: no step makes a square of a room."""
        if node not in self._taken:
            args, kwargs = node.args, node.kwargs
            rows = lambda n: self._at(n, slots, like) if _by_query(n) else n  # noqa: E731
            if node.target is torch.ops.mxfx.position_mask.default:
                args = (*args[:5], slots)
            elif _by_entry(node) or _adds_axis_before(node):
                args, kwargs = fx.map_arg((args, kwargs), rows)
            elif node.target is aten.expand.default and _by_query(source := node.all_input_nodes[0]):
                sizes = list(args[1])
                args = (rows(source), [*sizes[:-2], -1, sizes[-1]])
            else:
                args, kwargs = (node, slots), {}
            taken = torch.ops.mxfx.at_slots.default if args == (node, slots) else node.target
            self._taken[node] = self._rw.call(taken, *args, like=like, val=node.meta["val"], **kwargs)
        return self._taken[node]

    def _closure(self, value: fx.Node, weights: bool = False) -> list[fx.Node]:
        """``value`` and all that it is computed from, sizes as they are; ``weights`` too where asked."""
        found: dict[fx.Node, None] = {}
        left = [value]
        while left:
            node = left.pop()
            kinds = ("call_function", "get_attr") if weights else ("call_function",)
            if node.op not in kinds or node in found:
                continue
            found[node] = None
            if node.target is not aten.sym_size.int:
                left.extend(node.all_input_nodes)
        return list(found)

    def _axis(self, size: fx.Node) -> int | None:
        """The axis of the ids that is as long as ``size``."""
        sizes = [str(one) for one in self._ids.meta["val"].shape]
        text = str(size.meta["val"])
        return sizes.index(text) if text in sizes else None

    def _made(self, node: fx.Node, like: fx.Node) -> fx.Node:
        """A copy of ``node`` that is computed from all tokens of a cache."""
        if node.op == "get_attr" or node is self._mask:
            return node
        if node is self._ids:
            if self._tokens is None:
                val = node.meta["val"]
                self._tokens = self._rw.call(torch.ops.mxfx.real_tokens.default, node, self._mask, like=like, val=val)
            return self._tokens
        if node not in self._known:
            args: tuple = (self._ids, self._axis(node)) if node.target is aten.sym_size.int else node.args
            args, kwargs = fx.map_arg((args, node.kwargs), lambda n: self._made(n, like))
            self._known[node] = self._rw.call(node.target, *args, like=like, val=node.meta["val"], **kwargs)
        return self._known[node]

    def shows_later(self, value: fx.Node) -> str | None:
        """Why a token of a short text, padded or not, may see a later one; None where ``value`` hides them all."""
        ids = torch.ones(2, _SHOWN, dtype=torch.int64)
        padded = ids.clone()
        padded[0, :5] = 0
        unread = next((n for n in self._closure(value, weights=True) if self._is_unread(n)), None)
        if unread is not None:
            return f"{value.name} is made from {unread.target}, {UNREAD}"
        worst = max(_later(self._evaluated(value, ids, mask)) for mask in (None, padded))
        if worst <= _least():
            return None
        if worst > _FAR:
            return f"{value.name} lets tokens see later ones"
        return (
            f"{value.name} adds {worst:g} to the scores of later tokens, which hides none whose score is higher by that"
        )

    def _is_unread(self, node: fx.Node) -> bool:
        return node.op == "get_attr" and self._rw.program.weights[str(node.target)].device.type == "meta"

    def _evaluated(self, value: fx.Node, ids: Tensor, mask: Tensor | None) -> Tensor:
        program = self._rw.program
        env: dict[fx.Node, object] = {self._ids: ids, self._mask: mask}

        def compute(node: fx.Node) -> object:
            if node not in env:
                if node.op == "get_attr":
                    env[node] = runtime_weight(program, str(node.target)).to(ids.device)
                elif node.target is aten.sym_size.int:
                    env[node] = ids.shape[self._axis(node) or 0]
                else:
                    for operand in node.all_input_nodes:
                        compute(operand)
                    env[node] = call(program, node, env, {})
            return env[node]

        with torch.no_grad():
            result = compute(value)
        assert isinstance(result, Tensor)
        return result


def _by_query(node: fx.Node) -> bool:
    """Whether a value has a row for each query."""
    val = node.meta.get("val")
    return isinstance(val, Tensor) and val.dim() >= 2 and val.shape[-2] != 1


def _by_entry(node: fx.Node) -> bool:
    """Whether each entry of a value is computed from the entries that lie there in its operands."""
    target = node.target
    return kind(node) == "cast" or (isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags)


def _adds_axis_before(node: fx.Node) -> bool:
    """Whether a value is another with an axis more, before its queries."""
    rank = node.meta["val"].dim()
    return node.target is aten.unsqueeze.default and int(node.args[1]) % rank < rank - 2


def _later(value: Tensor) -> float:
    """The largest number that is added to the score of a later token."""
    if value.shape[-2] == 1:
        return 0.0
    added = torch.where(value, 0.0, _least()) if value.dtype == torch.bool else value
    rows, columns = torch.triu_indices(added.shape[-2], added.shape[-1], 1)
    return float(added[..., rows, columns].max())
