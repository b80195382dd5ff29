"""``fuse-activation-quant``: SiLU, product and the quantizer behind them as one op."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from mxfx.graph.node import path_of
from mxfx.rewrite import ALL, Context, Local, Numerics, Pass, Rewriter, Selector, register
from mxfx.rewrite.quantizer import sole_quantizer


@register
@dataclass(frozen=True)
class FuseActivationQuant(Pass):
    """Let one kernel compute a gated activation (SwiGLU, arXiv 2002.05202, eq. 5), transform it and round it.

    Before::

        %a  = silu(%gate)
        %m  = mul(%a, %up)
        %m4 = mxfx.fake_quantize(%m, "mxint4@32", -1)     # or mxfx.transform_quantize(%m, @t, "mxint4@32")

    After::

        %m4 = mxfx.silu_mul_quantize(%gate, %up, None, "mxint4@32", False)

    Only where nothing else reads the activation or the product. Run it after `fuse-hadamard-quant`.
    """

    name: ClassVar[str] = "fuse-activation-quant"
    requires: ClassVar[frozenset[str]] = frozenset({"raised"})
    provides: ClassVar[frozenset[str]] = frozenset({"quantizers-fused"})
    forbids: ClassVar[frozenset[str]] = frozenset({"lowered"})
    numerics: ClassVar[Numerics] = Local(1e-2)
    select: Selector = ALL

    def run(self, rw: Rewriter, ctx: Context) -> None:
        for node in rw.program.nodes("silu"):
            if not self.select(path_of(node)):
                continue
            product = _product(node)
            quantizer = product if isinstance(product, str) else sole_quantizer(product)
            if isinstance(quantizer, str) or isinstance(product, str):
                rw.skip(node, str(quantizer))
            elif rw.match(product, note=str(quantizer)):
                up = next(operand for operand in product.args if operand is not node)
                rest = (quantizer.matrix, quantizer.format, quantizer.hadamard)
                quantizer.become(rw, torch.ops.mxfx.silu_mul_quantize.default, node.args[0], up, *rest)


def _product(silu: fx.Node) -> fx.Node | str:
    """The product of an activation with another tensor of its shape; else, as text, why there is none."""
    readers = list(silu.users)
    if len(readers) != 1 or readers[0].target is not torch.ops.aten.mul.Tensor:
        return "it is not read by one product alone"
    (product,) = readers
    up = [operand for operand in product.args if operand is not silu]
    if len(up) != 1 or not isinstance(up[0], fx.Node):
        return f"{product.name} multiplies it by no other tensor"
    if up[0].meta["val"].shape != silu.meta["val"].shape:
        return f"{product.name} multiplies it by a tensor of another shape, {tuple(up[0].meta['val'].shape)}"
    return product
