"""``quantize-kv-cache``: keep keys and values in their annotated formats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from mxfx.graph.node import info, kind, path_of
from mxfx.graph.program import Program
from mxfx.ops.catalogue import spec
from mxfx.rewrite import ALL, Context, Lossy, Numerics, Pass, Rewriter, Selector, fact, register
from mxfx.rewrite.operands import is_quantized, quantize_operand

_CACHED = ("k", "v")


@register
@dataclass(frozen=True)
class QuantizeKvCache(Pass):
    """Round keys (after RoPE) and values onto their formats along the head dimension, before attention reads them.

    Before::

        %o = mxfx.attention(%q, %k, %v, …)  {k: mxint4@32, v: mxint4@32}

    After::

        %k4 = mxfx.fake_quantize(%k, "mxint4@32", -1)
        %v4 = mxfx.fake_quantize(%v, "mxint4@32", -1)
        %o  = mxfx.attention(%q, %k4, %v4, …)

    So the prefill sees the same keys and values that a cache in that format would hold.
    """

    name: ClassVar[str] = "quantize-kv-cache"
    requires: ClassVar[frozenset[str]] = frozenset({"annotated"})
    provides: ClassVar[frozenset[str]] = frozenset({"kv-quantized"})
    forbids: ClassVar[frozenset[str]] = frozenset({"quantizers-fused"})
    numerics: ClassVar[Numerics] = Lossy()
    select: Selector = ALL

    def run(self, rw: Rewriter, ctx: Context) -> None:
        for node in rw.program.nodes("attention"):
            if not self.select(path_of(node)):
                continue
            for operand in _CACHED:
                if operand in info(node).formats:
                    quantize_operand(rw, node, operand)
                else:
                    rw.skip(node, f"{operand} carries no format")


@fact("kv-quantized", "annotated keys and values are rounded")
def kv_quantized(program: Program) -> str | None:
    selected = [n for n in program.graph.nodes if kind(n) == "attention" and _quantized_here(n)]
    if selected or not any(kind(n) == "attention" and {"k", "v"} & set(info(n).formats) for n in program.graph.nodes):
        return None
    return "keys and values carry formats and none is quantized"


def _quantized_here(node: fx.Node) -> bool:
    formats = info(node).formats
    return any(o in formats and is_quantized(spec(node).get(o), formats[o].format) for o in _CACHED)
