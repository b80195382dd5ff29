"""``raise-attention``: softmax attention as one node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx
from torch.ops import aten

from mxfx.graph.node import kind, operands
from mxfx.graph.program import Program
from mxfx.rewrite import Context, Exact, Numerics, Pass, Rewriter, register
from mxfx.rewrite.facts import ATTENTION_RAISED, NORMS_RAISED, RAISED, ROPES_RAISED, Fact, Selected
from mxfx.rewrite.roles import spelled_out

#: Why an attention that no interface gave stays as it is, and what that means.
SPELLED_OUT = (
    "the model multiplies queries, keys and values itself, not through transformers' attention interface: it stays "
    "spelled out, keys and values carry no format"
)


@register
@dataclass(frozen=True)
class RaiseAttention(Pass):
    """Turn each scaled dot-product attention into one ``mxfx.attention`` node with unrepeated key-value heads.

    Models that use transformers' attention interface arrive raised, because ``trace`` registers one; this pass counts
    them. A model with attention of its own that calls SDPA is rewritten:

    Before::

        %kr = reshape(expand(unsqueeze(%k, 2), …))       # repeated heads, where the model repeats them
        %y  = scaled_dot_product_attention(%q, %kr, %vr, %mask, 0.0, False, scale=s)

    After::

        %y  = mxfx.attention(%q, %k, %v, %mask, s, causal)

    One that a model spells out as products around a softmax is reported and stays: its linears are quantized as others,
    its cache is not.
    """

    name: ClassVar[str] = "raise-attention"
    provides: ClassVar[frozenset[Fact]] = frozenset({ATTENTION_RAISED, RAISED})
    requires: ClassVar[frozenset[Fact]] = frozenset({NORMS_RAISED, ROPES_RAISED})
    numerics: ClassVar[Numerics] = Exact()
    required: ClassVar[bool] = True

    def run(self, rw: Rewriter, ctx: Context) -> None:
        for node in rw.program.nodes():
            if kind(node) == "attention":
                rw.match(node, note="traced through the attention interface")
            elif "v" in spelled_out(node):
                rw.skip(node, SPELLED_OUT)
            elif node.target is aten.scaled_dot_product_attention.default:
                self._raise(rw, node)

    def _raise(self, rw: Rewriter, node: fx.Node) -> None:
        q, k, v, mask, _, causal, scale, _ = operands(node).values()
        reason = _refused(node)
        if reason is not None:
            rw.skip(node, reason)
            return
        if not rw.match(node, note="from scaled_dot_product_attention"):
            return
        scale = q.meta["val"].shape[-1] ** -0.5 if scale is None else scale
        heads = (_unrepeated(k), _unrepeated(v))
        new = rw.call(torch.ops.mxfx.attention.default, q, *heads, mask, float(scale), bool(causal), like=node)
        rw.replace(node, new)


def _unrepeated(node: fx.Node) -> fx.Node:
    """The key or value before its heads were repeated by unsqueeze, expand and reshape; the node itself otherwise."""
    chain = (aten.reshape.default, aten.expand.default, aten.unsqueeze.default)
    source = node
    for target in chain:
        if source.target is not target:
            return node
        source = source.args[0]
    return source


@ATTENTION_RAISED.means
def attention_raised(program: Program, selected: Selected) -> str | None:
    for node in program.graph.nodes:
        if node.target is aten.scaled_dot_product_attention.default and _refused(node) is None:
            return f"{node.name} still is a scaled_dot_product_attention"
    return None


def _refused(node: fx.Node) -> str | None:
    """Why ``mxfx.attention`` cannot stand for this call; None if it can."""
    bound = operands(node)
    mask, dropout = bound["attn_mask"], bound["dropout_p"]
    if dropout:
        return f"attention with dropout {dropout}"
    if isinstance(mask, fx.Node) and mask.meta["val"].dtype != torch.bool:
        return "its mask is additive, not boolean"
    return None


@RAISED.means
def raised(program: Program, selected: Selected) -> str | None:
    parts = (NORMS_RAISED, ROPES_RAISED, ATTENTION_RAISED)
    return next((reason for fact in parts if (reason := fact.check(program, selected)) is not None), None)
