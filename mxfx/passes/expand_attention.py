"""``expand-attention``: attention as matmul, softmax, matmul, where operands inside it carry formats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx
from torch.ops import aten

from mxfx.graph.node import Annotation, info, operands, path_of
from mxfx.graph.program import Program
from mxfx.ops import attention_bias
from mxfx.rewrite import ALL, Close, Context, Numerics, Pass, Rewriter, Selector, register
from mxfx.rewrite.facts import (
    ACTIVATIONS_QUANTIZED,
    ANNOTATED,
    ATTENTION_EXPANDED,
    KV_QUANTIZED,
    LOWERED,
    RAISED,
    Fact,
    Selected,
)

_INNER = ("q", "probs", "softmax")
#: Wider than any sequence: with a window the mask is always a tensor, which an explicit softmax needs.
_NO_WINDOW = 1 << 40


@register
@dataclass(frozen=True)
class ExpandAttention(Pass):
    """Spell out attention whose queries, scores or probabilities carry formats.

    Before::

        %o = mxfx.attention(%q, %k, %v, %mask, s)  {q: …, softmax: …, probs: …, k: …, v: …}

    After::

        %s = matmul(%q, transpose(%k)) * s;  %s0 = masked_fill(%s, %hidden, 0)   {output: softmax format}
        %p = softmax(masked_fill(%s0, %hidden, -inf))                            {output: probs format}
        %o = matmul(%p, %v)                       %q, %k, %v by casts            {output: their formats}

    ``insert-fake-quant`` then rounds those outputs. Hidden scores are zero when scores are rounded and -inf afterwards:
    a hidden position neither sets a block's scale nor gets probability. Grouped heads are repeated.
    """

    name: ClassVar[str] = "expand-attention"
    requires: ClassVar[frozenset[Fact]] = frozenset({RAISED, ANNOTATED})
    provides: ClassVar[frozenset[Fact]] = frozenset({ATTENTION_EXPANDED})
    forbids: ClassVar[frozenset[Fact]] = frozenset({ACTIVATIONS_QUANTIZED, KV_QUANTIZED, LOWERED})
    numerics: ClassVar[Numerics] = Close(1e-9)
    by_phase: ClassVar[bool] = True
    select: Selector = ALL

    def run(self, rw: Rewriter, ctx: Context) -> None:
        hidden: dict[tuple, fx.Node] = {}
        for attention in rw.program.nodes("attention"):
            if not self.select(attention):
                continue
            inner = [o for o in _INNER if o in info(attention).formats]
            if not inner:
                rw.skip(attention, "neither queries, scores nor probabilities carry a format")
            elif operands(attention)["sinks"] is not None:
                rw.skip(attention, "its softmax has sinks: scores of keys that have no place in a product")
            elif rw.match(attention, note=", ".join(inner)):
                _expand(rw, attention, hidden)


def _expand(rw: Rewriter, attention: fx.Node, hidden: dict[tuple, fx.Node]) -> None:
    given = operands(attention)
    formats = info(attention).formats
    q, k, v = (_carrying(rw, given[name], formats.get(name), attention) for name in ("q", "k", "v"))
    group = q.meta["val"].shape[1] // k.meta["val"].shape[1]
    if group > 1:
        k, v = (rw.call(aten.repeat_interleave.self_int, x, group, 1, like=attention) for x in (k, v))
    hide = _hidden(rw, attention, given, hidden)
    keys = rw.call(aten.transpose.int, k, -2, -1, like=attention)
    scores = rw.call(
        aten.mul.Tensor, rw.call(aten.matmul.default, q, keys, like=attention), given["scale"], like=attention
    )
    if given["softcap"] is not None:
        cap = given["softcap"]
        bounded = rw.call(aten.tanh.default, rw.call(aten.div.Tensor, scores, cap, like=attention), like=attention)
        scores = rw.call(aten.mul.Tensor, bounded, cap, like=attention)
    if given["bias"] is not None:
        scores = rw.call(aten.add.Tensor, scores, given["bias"], like=attention)
    seen = rw.call(aten.masked_fill.Scalar, scores, hide, 0.0, like=attention)
    _put(rw, seen, formats.get("softmax"))
    masked = rw.call(aten.masked_fill.Scalar, seen, hide, float("-inf"), like=attention)
    wide = rw.call(torch.ops.mxfx.cast.default, masked, "compute", like=attention)
    probs = rw.call(
        torch.ops.mxfx.cast.default, rw.call(aten.softmax.int, wide, -1, like=attention), "model", like=attention
    )
    _put(rw, probs, formats.get("probs"))
    result = rw.call(aten.matmul.default, probs, v, like=attention)
    attention.replace_all_uses_with(result)
    rw.erase(attention)


def _carrying(rw: Rewriter, source: object, annotation: Annotation | None, attention: fx.Node) -> fx.Node:
    """The operand, behind a cast that changes nothing but can carry a format for this reader alone."""
    assert isinstance(source, fx.Node)
    if annotation is None:
        return source
    own = rw.call(torch.ops.mxfx.cast.default, source, "model", like=attention)
    _put(rw, own, annotation)
    return own


def _put(rw: Rewriter, node: fx.Node, annotation: Annotation | None) -> None:
    if annotation is not None:
        rw.set_info(node, info(node).with_format("output", annotation))


def _hidden(rw: Rewriter, attention: fx.Node, given: dict[str, object], known: dict[tuple, fx.Node]) -> fx.Node:
    """True where a query may not attend; one for all layers that share tokens, causality and window."""
    mask, causal, window, chunk = (given[name] for name in ("mask", "causal", "window", "chunk"))
    key = (mask, causal, window, chunk)
    if key not in known:
        tokens = (given["q"], given["k"])
        allowed = rw.call(attention_bias, mask, *tokens, causal, window or _NO_WINDOW, chunk, like=attention)
        known[key] = rw.call(aten.logical_not.default, allowed, like=attention)
    return known[key]


@ATTENTION_EXPANDED.means
def attention_expanded(program: Program, selected: Selected) -> str | None:
    left = [n for n in program.nodes("attention") if selected(n) and set(_INNER) & set(info(n).formats)]
    return f"{path_of(left[0])} still is one node" if left else None
