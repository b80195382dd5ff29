"""``insert-fake-quant``: quantize annotated activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from mxfx.graph.node import info, path_of
from mxfx.graph.program import Program
from mxfx.ops.catalogue import spec
from mxfx.rewrite import ALL, Context, Lossy, Numerics, Pass, Rewriter, Selector, register
from mxfx.rewrite.facts import ACTIVATIONS_QUANTIZED, ANNOTATED, LOWERED, QUANTIZERS_FUSED, Fact, Selected
from mxfx.rewrite.operands import is_quantized, quantize_operand, quantized

#: Computed operands that are rounded here; those of attention belong to other passes.
_OPERANDS = ("input", "cos", "sin")


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
    requires: ClassVar[frozenset[Fact]] = frozenset({ANNOTATED})
    provides: ClassVar[frozenset[Fact]] = frozenset({ACTIVATIONS_QUANTIZED})
    forbids: ClassVar[frozenset[Fact]] = frozenset({QUANTIZERS_FUSED, LOWERED})
    numerics: ClassVar[Numerics] = Lossy()
    by_phase: ClassVar[bool] = True
    select: Selector = ALL

    def run(self, rw: Rewriter, ctx: Context) -> None:
        for node in rw.program.nodes():
            if self.select(node):
                for operand in _OPERANDS:
                    if operand in info(node).formats and spec(node).has(operand):
                        quantize_operand(rw, node, operand)
                _quantize_output(rw, node)


def _quantize_output(rw: Rewriter, node: fx.Node) -> None:
    annotation = info(node).formats.get("output")
    if annotation is None:
        return
    readers = [user for user in node.users if not is_quantized(user, annotation.format)]
    if not readers:
        rw.skip(node, f"its output is in {annotation.format} already", done=True)
    elif rw.match(node, note=f"output {annotation.format}"):
        new = quantized(rw, node, annotation.format)
        for user in readers:
            user.replace_input_with(node, new)
            rw.touch(user)


@ACTIVATIONS_QUANTIZED.means
def activations_quantized(program: Program, selected: Selected) -> str | None:
    for node in filter(selected, program.graph.nodes):
        formats = {operand: annotation.format for operand, annotation in info(node).formats.items()}
        for operand, fmt in formats.items():
            if operand in _OPERANDS and spec(node).has(operand):
                readings = [spec(node).get(operand)]
            else:
                readings = list(node.users) if operand == "output" else []
            if not all(is_quantized(reading, fmt) for reading in readings):
                return f"the {operand} of {node.name} ({path_of(node)}) is to be {fmt} and is not quantized"
    return None
