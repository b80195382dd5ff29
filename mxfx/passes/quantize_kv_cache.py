"""``quantize-kv-cache``: keep keys and values in their annotated formats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mxfx.graph.node import info, path_of
from mxfx.graph.program import Program
from mxfx.ops.catalogue import spec
from mxfx.rewrite import ALL, Context, Lossy, Numerics, Pass, Rewriter, Selector, register
from mxfx.rewrite.facts import ANNOTATED, KV_QUANTIZED, QUANTIZERS_FUSED, Fact, Selected
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
    requires: ClassVar[frozenset[Fact]] = frozenset({ANNOTATED})
    provides: ClassVar[frozenset[Fact]] = frozenset({KV_QUANTIZED})
    forbids: ClassVar[frozenset[Fact]] = frozenset({QUANTIZERS_FUSED})
    numerics: ClassVar[Numerics] = Lossy()
    select: Selector = ALL

    def run(self, rw: Rewriter, ctx: Context) -> None:
        for node in rw.program.nodes("attention"):
            if not self.select(node):
                continue
            for operand in _CACHED:
                if operand in info(node).formats:
                    quantize_operand(rw, node, operand)
                else:
                    rw.skip(node, f"{operand} carries no format")


@KV_QUANTIZED.means
def kv_quantized(program: Program, selected: Selected) -> str | None:
    for node in filter(selected, program.nodes("attention")):
        for operand in _CACHED:
            annotation = info(node).formats.get(operand)
            if annotation is not None and not is_quantized(spec(node).get(operand), annotation.format):
                return f"{operand} of {path_of(node) or node.name} is to be {annotation.format} and is not quantized"
    return None
