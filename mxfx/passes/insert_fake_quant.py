"""``insert-fake-quant``: quantize annotated activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from mxfx.graph.node import info, path_of
from mxfx.graph.program import Program
from mxfx.ops.catalogue import spec
from mxfx.rewrite import ALL, Context, Lossy, Numerics, Pass, Rewriter, Selector, fact, register
from mxfx.rewrite.operands import is_quantized, quantize_operand, quantized

_fake_quantize = torch.ops.mxfx.fake_quantize.default


@register
@dataclass(frozen=True)
class InsertFakeQuant(Pass):
    """Round every annotated activation onto its format, along the last axis.

    Before::

        %q = linear(%x, @wq)  {input: mxint4@32}
        %k = linear(%x, @wk)  {input: mxint4@32}

    After::

        %x4 = mxfx.fake_quantize(%x, "mxint4@32", -1)
        %q  = linear(%x4, @wq)
        %k  = linear(%x4, @wk)

    A tensor is quantized once per format, however many nodes read it.
    """

    name: ClassVar[str] = "insert-fake-quant"
    requires: ClassVar[frozenset[str]] = frozenset({"annotated"})
    provides: ClassVar[frozenset[str]] = frozenset({"activations-quantized"})
    forbids: ClassVar[frozenset[str]] = frozenset({"quantizers-fused"})
    numerics: ClassVar[Numerics] = Lossy()
    select: Selector = ALL

    def run(self, rw: Rewriter, ctx: Context) -> None:
        for node in rw.program.nodes():
            if self.select(path_of(node)):
                if "input" in info(node).formats and spec(node).has("input"):
                    quantize_operand(rw, node, "input")
                _quantize_output(rw, node)


def _quantize_output(rw: Rewriter, node: fx.Node) -> None:
    annotation = info(node).formats.get("output")
    if annotation is None:
        return
    readers = [user for user in node.users if not is_quantized(user, annotation.format)]
    if not readers:
        rw.skip(node, f"its output is in {annotation.format} already")
    elif rw.match(node, note=f"output {annotation.format}"):
        new = quantized(rw, node, annotation.format)
        for user in readers:
            user.replace_input_with(node, new)
            rw.touch(user)


@fact("activations-quantized", "annotated activations are rounded")
def activations_quantized(program: Program) -> str | None:
    if not any(n.target is _fake_quantize for n in program.graph.nodes) and any(
        "input" in info(n).formats or "output" in info(n).formats for n in program.graph.nodes
    ):
        return "activations carry formats and none is quantized"
    return None
