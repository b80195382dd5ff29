"""``quantize-kv-cache``: keep keys and values in their annotated formats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx
from torch.ops import mxfx

from mxfx.graph.node import info, path_of
from mxfx.graph.program import Program
from mxfx.ops.catalogue import spec
from mxfx.rewrite import ALL, Context, Lossy, Numerics, Pass, Rewriter, Selector, register
from mxfx.rewrite.facts import ANNOTATED, KV_QUANTIZED, LOWERED, QUANTIZERS_FUSED, Fact, Selected
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

    So the prefill sees the same keys and values that a cache in that format would hold. With ``keep_first = 4`` the
    first tokens of each text, on which attention rests, stay as they are::

        %s  = mxfx.first_slots(%input_ids, %attention_mask)
        %k4 = mxfx.keep_first_quantize(%k, %s, None, 4, "mxint4@32")

    ``insert-kv-cache`` holds them in the model's dtype beside the codes: keep_first x kv_heads x head_dim entries a
    text and layer, for keys and for values.

    keep_first: how many tokens at the beginning of each text, padding not counted, are not rounded. Other than 0, steps
        of decoding are computed by the definition: no kernel reads two caches.
    keep_last: refused unless 0: the newest tokens are rounded as they come. Were they kept until their block is full,
        a key would be one number for the queries of its block and another for later ones, and a prefill would need
        both for every query to be what decoding is.
    """

    name: ClassVar[str] = "quantize-kv-cache"
    requires: ClassVar[frozenset[Fact]] = frozenset({ANNOTATED})
    provides: ClassVar[frozenset[Fact]] = frozenset({KV_QUANTIZED})
    forbids: ClassVar[frozenset[Fact]] = frozenset({QUANTIZERS_FUSED, LOWERED})
    numerics: ClassVar[Numerics] = Lossy()
    by_phase: ClassVar[bool] = True
    select: Selector = ALL
    keep_first: int = 0
    keep_last: int = 0

    def __post_init__(self) -> None:
        if self.keep_last:
            raise ValueError(
                f"keep_last = {self.keep_last}: no cache keeps the newest tokens until their block is full; expected 0 "
                "(they are rounded as they come), and keep_first for the tokens that attention rests on"
            )
        if self.keep_first < 0:
            raise ValueError(f"keep_first = {self.keep_first}; expected a number of tokens, 0 or more")

    def run(self, rw: Rewriter, ctx: Context) -> None:
        for node in rw.program.nodes("attention"):
            if not self.select(node):
                continue
            for operand in _CACHED:
                if operand not in info(node).formats:
                    rw.skip(node, f"{operand} carries no format")
                elif self.keep_first:
                    _quantize_behind(rw, node, operand, self.keep_first)
                else:
                    quantize_operand(rw, node, operand)


def _quantize_behind(rw: Rewriter, node: fx.Node, operand: str, first: int) -> None:
    """Let a key or value be rounded behind its ``first`` tokens."""
    source, fmt = spec(node).node_of(operand), info(node).formats[operand].format
    assert source is not None
    if is_quantized(source, fmt):
        rw.skip(node, f"its {operand} is in {fmt} already", done=True)
    elif rw.match(node, note=f"{operand} {fmt} behind {first} tokens"):
        ids, mask = (n for n in rw.graph.nodes if n.op == "placeholder" and n.target in ("input_ids", "attention_mask"))
        starts = next(rw.program.nodes("first_slots"), None)
        if starts is None:
            last = [n for n in rw.graph.nodes if n.op == "placeholder"][-1]
            starts = rw.call(mxfx.first_slots.default, ids, mask, like=node, after=last)
        given = (source, starts, None, first, str(fmt))
        new = rw.call(mxfx.keep_first_quantize.default, *given, like=node, val=source.meta["val"])
        spec(node).set(rw, operand, new)


@KV_QUANTIZED.means
def kv_quantized(program: Program, selected: Selected) -> str | None:
    for node in filter(selected, program.nodes("attention")):
        for operand in _CACHED:
            annotation = info(node).formats.get(operand)
            if annotation is not None and not is_quantized(spec(node).get(operand), annotation.format):
                return f"{operand} of {path_of(node) or node.name} is to be {annotation.format} and is not quantized"
    return None
