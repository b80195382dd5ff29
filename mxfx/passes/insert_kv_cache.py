"""``insert-kv-cache``: attention over a cache of keys and values that comes in from outside."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from mxfx.formats import Format, parse
from mxfx.formats.stored import codes_length, scales_length, stores
from mxfx.graph.node import kind, operands
from mxfx.graph.phases import NO_CACHE, kept_as_numbers
from mxfx.graph.program import NOMINAL_MODEL, Program
from mxfx.graph.tokenwise import mixes_tokens
from mxfx.ops.catalogue import spec
from mxfx.rewrite import Context, Exact, Numerics, Pass, Rewriter, register
from mxfx.rewrite.facts import LOWERED, RAISED, Fact
from mxfx.rewrite.own_masks import OwnMasks

#: How a reason ends of what no causal model does.
_SEES_LATER = "sees later tokens"


@register
@dataclass(frozen=True)
class InsertKvCache(Pass):
    """Let every attention write its keys and values into a cache, and read all that the cache holds.

    Before::

        %o = mxfx.attention(%q, %k, %v, %mask, s, True, w)

    After::

        %cache_0_keys = input(None) : bf16[batch, kv_heads, room, head_dim]      # and values, and one input %slots
        %o = mxfx.cached_attention(%q, %k, %v, %mask, %slots, %cache_0_keys!, %cache_0_values!, None, None, s, True, w)

    One graph serves prefill, chunks and decode: the number of new tokens and the room of the cache are two dynamic
    sizes of the same call. A pair of graphs would print every layer twice to say the same. Without caches (None) the
    graph is what it was, to the bit. Keys and values that are rounded onto a format with E8M0 scales are kept as its
    codes and scales, ``u8``; but for those that two phases of a pipeline write in formats of their own, and neither
    is to round again. Layers that read the same keys and values share a cache. If anything in the model but
    attention lets tokens see each other, nothing is changed: no cache holds its state. Nor where an attention sees
    later tokens, which is warned of: such a model is no causal one.

    Tokens that the model numbers itself (attention temperatures by place) get the numbers of their slots. A mask or a
    bias that the model makes itself (ALiBi, masks of other shapes), from padding and places alone, is made for the new
    tokens over all that the cache holds: ``at_slots`` takes their rows of what it is made from, as early as it can::

        %b = …(%input_ids, %attention_mask)                   %t = mxfx.real_tokens(%input_ids, %attention_mask)
        %o = mxfx.attention(%q, %k, %v, None, s, …, %b)       %b = …(mxfx.at_slots(…(%t, %attention_mask), %slots))
    """

    name: ClassVar[str] = "insert-kv-cache"
    requires: ClassVar[frozenset[Fact]] = frozenset({RAISED})
    forbids: ClassVar[frozenset[Fact]] = frozenset({LOWERED})
    numerics: ClassVar[Numerics] = Exact()

    def run(self, rw: Rewriter, ctx: Context) -> None:
        found, masks = _attentions(rw.program), OwnMasks(rw)
        reason = _refused(rw, found, masks)
        if reason is not None:
            if reason.endswith(_SEES_LATER):
                rw.warn(f"{reason}: of what is no causal model neither perplexity nor generated text means anything")
            for node in found:
                rw.skip(node, reason)
            if not any(rw.program.nodes("cached_attention")):
                rw.program.notes[NO_CACHE] = reason
            return
        plain = kept_as_numbers(rw.program, ctx.peer, ctx.handoff)
        if plain:
            rw.record.details["numbers"] = f"{len(plain)} caches keep what both phases write, in formats that differ"
        inputs, counters = _Inputs(rw, plain, found), _counters(rw)
        for node in found:
            if rw.match(node):
                _insert(rw, node, inputs, masks)
        ids = next(n for n in rw.graph.nodes if n.op == "placeholder")
        for node in counters:
            given = (ids, "queries", inputs.slots)
            rw.replace(node, rw.call(torch.ops.mxfx.places.default, *given, like=node, val=node.meta["val"]))


def without_cache(program: Program) -> str | None:
    """Why a raised program can have no cache of keys and values; None if it can."""
    rw = Rewriter(program, InsertKvCache.name)
    return _refused(rw, _attentions(program), OwnMasks(rw))


def _attentions(program: Program) -> list[fx.Node]:
    return [node for node in program.nodes("attention") if node.target is torch.ops.mxfx.attention.default]


def _refused(rw: Rewriter, found: list[fx.Node], masks: OwnMasks) -> str | None:
    """Why a program can have no cache; None if it can."""
    if not found:
        return "no attention in it is one node (raise-attention says why)"
    length = next(n for n in rw.graph.nodes if n.op == "placeholder").meta["val"].shape[1]
    makers = masks.makers([value for node in found for value in _own(node)])
    served = makers.union(_counters(rw))
    others = [node for node in rw.program.nodes() if node not in served]
    # What has a state is the better reason.
    for node in sorted(others, key=lambda node: kind(node) != "mixer"):
        reason = mixes_tokens(node, length)
        if reason is not None:
            return f"{node.name}: {reason}, and no cache holds its state"
    for node in found:
        own, given = _own(node), operands(node)
        # A ready mask is all that is hidden: causality is not joined to it.
        ready = [value for value in own if value is given["mask"] and value.meta["val"].dim() == 4]
        causal = given["causal"] and not ready
        if not own and not causal:
            return f"{node.name} {_SEES_LATER}"
        reason = next((why for value in own if (why := masks.refused(value)) is not None), None)
        if reason is None and not causal:
            shown = [masks.shows_later(value) for value in own]
            reason = None if None in shown else " and ".join(map(str, shown))
        if reason is not None:
            return f"{node.name}: {reason}"
    return None


def _counters(rw: Rewriter) -> list[fx.Node]:
    """Nodes that number the tokens of a call, which are those at ``slots``."""
    length = str(next(n for n in rw.graph.nodes if n.op == "placeholder").meta["val"].shape[1])

    def counts(node: fx.Node) -> bool:
        given = operands(node)
        end = given["end"]
        text = isinstance(end, fx.Node) and str(end.meta["val"]) == length
        return text and given["start"] == 0 and given["step"] == 1

    return [node for node in rw.program.nodes("arange") if counts(node)]


def _own(attention: fx.Node) -> list[fx.Node]:
    """The mask and the bias that the model makes itself."""
    given = operands(attention)
    values = (given["mask"], given["bias"])
    return [value for value in values if isinstance(value, fx.Node) and value.op != "placeholder"]


class _Inputs:
    """The inputs that hold caches: one pair for each pair of keys and values of ``attentions``."""

    def __init__(self, rw: Rewriter, plain: frozenset[int], attentions: list[fx.Node]) -> None:
        self._rw = rw
        self._plain = plain
        self._readers = Counter((given["k"], given["v"]) for given in map(operands, attentions))
        first = next(n for n in rw.graph.nodes if n.op == "placeholder")
        self._batch, length = first.meta["val"].shape
        self.slots = rw.input("slots", (length,), torch.int64)
        self._rooms: dict[object, torch.SymInt] = {}
        self._known: dict[tuple, tuple] = {}

    def of(self, k: fx.Node, v: fx.Node, window: int | None) -> tuple[tuple, bool]:
        """Keys, values, their scales and their formats for one attention; and whether it is the first to see them."""
        first = (k, v) not in self._known
        if first:
            # The second reader comes when the first has written: what a ring pushed out would be missing.
            window = window if self._readers[k, v] == 1 else None
            name = f"cache_{len(self._known)}"
            index = 2 * len(self._known)
            key = self._cache(f"{name}_key", k, window, index in self._plain)
            value = self._cache(f"{name}_value", v, window, index + 1 in self._plain)
            self._known[k, v] = tuple(zip(key, value, strict=True))
        return self._known[k, v], first

    def _cache(
        self, name: str, source: fx.Node, window: int | None, plain: bool
    ) -> tuple[fx.Node, fx.Node | None, str | None, fx.Node | None]:
        """Codes or numbers, scales, the format, and the first tokens that are not rounded."""
        _, heads, _, width = source.meta["val"].shape
        room = self._room(window)
        fmt, behind = _format(source), source.target is torch.ops.mxfx.keep_first_quantize.default
        if behind:
            spec(source).set(self._rw, "slots", self.slots)
        fmt = None if plain else fmt
        if fmt is None:
            return self._rw.input(f"{name}s", (self._batch, heads, room, width), NOMINAL_MODEL), None, None, None
        codes, scales = (
            self._rw.input(f"{name}{suffix}", (self._batch, heads, room, size), torch.uint8)
            for suffix, size in (("s", codes_length(width, fmt)), ("_scales", scales_length(width, fmt)))
        )
        if not behind:
            return codes, scales, str(fmt), None
        first = self._rw.input(f"{name}s_first", (self._batch, heads, spec(source).get("first"), width), NOMINAL_MODEL)
        return codes, scales, str(fmt), first

    def _room(self, window: int | None) -> torch.SymInt:
        """Places: as many as tokens, or a ring of at most ``window``."""
        if window not in self._rooms:
            longest = self._rw.program.symbols[1].high
            low, name = (1, "room") if window is None else (1, f"room_{window}")
            self._rooms[window] = self._rw.symbol(name, low, longest)
        return self._rooms[window]


def _format(source: fx.Node) -> Format | None:
    """The format that a value is rounded onto along its last axis, if a cache can hold its codes."""
    rounded = spec(source).rounds
    fmt = parse(rounded.format) if rounded is not None and rounded.axis == -1 else None
    return fmt if fmt is not None and stores(fmt) else None


def _insert(rw: Rewriter, node: fx.Node, inputs: _Inputs, masks: OwnMasks) -> None:
    given = operands(node)
    for name in ("mask", "bias"):
        if given[name] in _own(node):
            given[name] = masks.rows(given[name], inputs.slots, node)
            if name == "mask":
                # A ready mask is all that is hidden: its layer has no ring.
                given |= {"window": None, "chunk": None}
    limits = [int(given[name]) for name in ("window", "chunk") if given[name] is not None]  # type: ignore[call-overload]
    ((keys, values), scales, formats, firsts), first = inputs.of(given["k"], given["v"], min(limits, default=None))
    kept: tuple = ()
    if any(firsts):
        kept = (*firsts, next(rw.program.nodes("first_slots")))
    new = rw.call(
        torch.ops.mxfx.cached_attention.default,
        *(given[name] for name in ("q", "k", "v", "mask")), inputs.slots, keys, values, *scales,
        *list(given.values())[4:], *formats, first, *kept,
        like=node, val=node.meta["val"],
    )  # fmt: skip
    rw.replace(node, new)
