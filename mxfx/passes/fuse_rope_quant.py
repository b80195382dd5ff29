"""``fuse-rope-quant``: RoPE and the quantizer behind it as one op."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from mxfx.graph.node import operands, path_of
from mxfx.rewrite import ALL, Context, Local, Numerics, Pass, Rewriter, Selector, register
from mxfx.rewrite.quantizer import sole_quantizer


@register
@dataclass(frozen=True)
class FuseRopeQuant(Pass):
    """Let one kernel rotate a key by its position, transform its blocks where a transform follows, and round it.

    Before::

        %k  = mxfx.rope(%x, %cos, %sin)
        %k4 = mxfx.fake_quantize(%k, "mxint4@32", -1)     # or mxfx.transform_quantize(%k, @t, "mxint4@32")

    After::

        %k4 = mxfx.rope_quantize(%x, %cos, %sin, None, "mxint4@32", False)

    Only where nothing else reads the rotated tensor. Run it after `fuse-hadamard-quant`.
    """

    name: ClassVar[str] = "fuse-rope-quant"
    requires: ClassVar[frozenset[str]] = frozenset({"raised"})
    forbids: ClassVar[frozenset[str]] = frozenset({"lowered"})
    numerics: ClassVar[Numerics] = Local(1e-2)
    select: Selector = ALL

    def run(self, rw: Rewriter, ctx: Context) -> None:
        for node in rw.program.nodes("rope"):
            if not self.select(path_of(node)):
                continue
            quantizer = sole_quantizer(node)
            if isinstance(quantizer, str):
                rw.skip(node, quantizer)
            elif rw.match(node, note=str(quantizer)):
                rope = operands(node)
                rest = (quantizer.matrix, quantizer.format, quantizer.hadamard)
                op = torch.ops.mxfx.rope_quantize.default
                new = rw.call(
                    op, rope["x"], rope["cos"], rope["sin"], *rest, like=quantizer.node, val=quantizer.node.meta["val"]
                )
                rw.replace(quantizer.node, new)
