"""``rotate-qk`` (R3): queries and keys rotated after RoPE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from mxfx.algorithms.hadamard import fitting_order, order_words
from mxfx.graph.node import op_name, operands, path_of
from mxfx.graph.program import Program
from mxfx.ops.catalogue import spec
from mxfx.rewrite import ALL, Close, NodePass, Numerics, Rewriter, Selector, register
from mxfx.rewrite.facts import KV_QUANTIZED, LOWERED, QK_ROTATED, QUANTIZERS_FUSED, RAISED, Fact, Selected


@register
@dataclass(frozen=True)
class RotateQk(NodePass):
    """Rotate queries and keys by a Hadamard matrix behind RoPE (QuaRot's R3, arXiv 2404.00456, §4.3).

    Before::

        %o = mxfx.attention(%q, %k, %v, …)

    After::

        %qh = mxfx.hadamard(%q, block); %kh = mxfx.hadamard(%k, block)
        %o  = mxfx.attention(%qh, %kh, %v, …)

    Scores stay as they are, ``(q H)(k H)ᵀ = q kᵀ``; the key cache holds rotated keys. ``block`` is the order of H;
    0 takes the whole head.

    block: order of the Hadamard matrix, or the largest that divides it and the head; 0 for the whole head.
    """

    name: ClassVar[str] = "rotate-qk"
    kinds: ClassVar[tuple[str, ...]] = ("attention",)
    requires: ClassVar[frozenset[Fact]] = frozenset({RAISED})
    provides: ClassVar[frozenset[Fact]] = frozenset({QK_ROTATED})
    forbids: ClassVar[frozenset[Fact]] = frozenset({KV_QUANTIZED, LOWERED, QUANTIZERS_FUSED})
    numerics: ClassVar[Numerics] = Close(1e-9)
    block: int = 0
    select: Selector = ALL

    def refuse(self, rw: Rewriter, node: fx.Node) -> str | None:
        width = _width(node)
        if fitting_order(width, self.block) is None:
            return f"no Hadamard matrix of order {self.block or width} fits the head dimension {width}"
        return None

    def note(self, node: fx.Node) -> str:
        return f"order {order_words(_width(node), self.block, fitting_order(_width(node), self.block) or 0)}"

    def rewrite(self, rw: Rewriter, node: fx.Node) -> None:
        order = fitting_order(_width(node), self.block)
        for name in ("q", "k"):
            source = spec(node).get(name)
            rotated = rw.call(torch.ops.mxfx.hadamard.default, source, order, like=node)
            spec(node).set(rw, name, rotated)


def _width(attention: fx.Node) -> int:
    return operands(attention)["q"].meta["val"].shape[-1]


@QK_ROTATED.means
def qk_rotated(program: Program, selected: Selected) -> str | None:
    for attention in program.nodes("attention"):
        q, k = (operands(attention)[name] for name in ("q", "k"))
        if _rotation(q) != _rotation(k):
            return f"the queries and keys of {path_of(attention)} are rotated differently"
    return None


def _rotation(node: object) -> object:
    return spec(node).get("block") if isinstance(node, fx.Node) and op_name(node) == "mxfx.hadamard.default" else None
