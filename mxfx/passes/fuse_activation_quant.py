"""``fuse-activation-quant``: SiLU, product and the quantizer behind them as one op."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from mxfx.ops.catalogue import spec
from mxfx.rewrite import ALL, Rewriter, Selector, register
from mxfx.rewrite.quantizer import Quantizer, QuantizerFusion, sole_quantizer


@register
@dataclass(frozen=True)
class FuseActivationQuant(QuantizerFusion):
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
    kinds: ClassVar[tuple[str, ...]] = ("silu",)
    select: Selector = ALL

    def quantizer(self, node: fx.Node) -> Quantizer | str:
        product = _product(node)
        return product if isinstance(product, str) else sole_quantizer(product)

    def fuse(self, rw: Rewriter, node: fx.Node, quantizer: Quantizer) -> None:
        (product,) = node.users
        up = next(operand for operand in product.args if operand is not node)
        rest = (quantizer.matrix, quantizer.format, quantizer.hadamard)
        quantizer.become(rw, torch.ops.mxfx.silu_mul_quantize.default, spec(node).get("input"), up, *rest)


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
