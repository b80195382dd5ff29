"""``fuse-norm-quant``: RMSNorm and the quantizer behind it as one op."""

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
class FuseNormQuant(QuantizerFusion):
    """Let one kernel normalize a row, transform its blocks where a transform follows, and round the result.

    Before::

        %y  = mxfx.rms_norm(%x, @g, 1e-05)
        %y4 = mxfx.fake_quantize(%y, "mxint4@32", -1)     # or mxfx.transform_quantize(%y, @t, "mxint4@32")

    After::

        %y4 = mxfx.norm_quantize(%x, @g, None, "mxint4@32", 1e-05, 0.0, False, False)

    Only where nothing else reads the normalized tensor. Run it after `fuse-hadamard-quant`.
    """

    name: ClassVar[str] = "fuse-norm-quant"
    kinds: ClassVar[tuple[str, ...]] = ("rms_norm",)
    select: Selector = ALL

    def fuse(self, rw: Rewriter, node: fx.Node, quantizer: Quantizer) -> None:
        norm = spec(node)
        rest = [norm.get(name) for name in ("eps", "offset", "gain_first")]
        quantizer.become(
            rw,
            torch.ops.mxfx.norm_quantize.default,
            norm.get("input"),
            norm.get("weight"),
            quantizer.matrix,
            quantizer.format,
            *rest,
            quantizer.hadamard,
        )
