"""``fuse-rope-quant``: RoPE and the quantizer behind it as one op."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from mxfx.ops.catalogue import spec
from mxfx.rewrite import ALL, Rewriter, Selector, register
from mxfx.rewrite.quantizer import Quantizer, QuantizerFusion


@register
@dataclass(frozen=True)
class FuseRopeQuant(QuantizerFusion):
    """Let one kernel rotate a key by its position, transform its blocks where a transform follows, and round it.

    Before::

        %k  = mxfx.rope(%x, %cos, %sin)
        %k4 = mxfx.fake_quantize(%k, "mxint4@32", -1)     # or mxfx.transform_quantize(%k, @t, "mxint4@32")

    After::

        %k4 = mxfx.rope_quantize(%x, %cos, %sin, None, "mxint4@32", False)

    Only where nothing else reads the rotated tensor. Run it after `fuse-hadamard-quant`.
    """

    name: ClassVar[str] = "fuse-rope-quant"
    kinds: ClassVar[tuple[str, ...]] = ("rope",)
    select: Selector = ALL

    def fuse(self, rw: Rewriter, node: fx.Node, quantizer: Quantizer) -> None:
        rotated = [spec(node).get(name) for name in ("input", "cos", "sin")]
        rest = (quantizer.matrix, quantizer.format, quantizer.hadamard)
        quantizer.become(rw, torch.ops.mxfx.rope_quantize.default, *rotated, *rest)
