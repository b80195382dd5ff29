"""``fuse-norm-quant``: RMSNorm and the quantizer behind it as one op."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from mxfx.rewrite import ALL, Context, Local, Numerics, Pass, Rewriter, Selector, register
from mxfx.rewrite.quantizer import Quantizer, fuse_sole_quantizers


@register
@dataclass(frozen=True)
class FuseNormQuant(Pass):
    """Let one kernel normalize a row, transform its blocks where a transform follows, and round the result.

    Before::

        %y  = mxfx.rms_norm(%x, @g, 1e-05)
        %y4 = mxfx.fake_quantize(%y, "mxint4@32", -1)     # or mxfx.transform_quantize(%y, @t, "mxint4@32")

    After::

        %y4 = mxfx.norm_quantize(%x, @g, None, "mxint4@32", 1e-05, 0.0, False, False)

    Only where nothing else reads the normalized tensor. Run it after `fuse-hadamard-quant`.
    """

    name: ClassVar[str] = "fuse-norm-quant"
    requires: ClassVar[frozenset[str]] = frozenset({"raised"})
    provides: ClassVar[frozenset[str]] = frozenset({"quantizers-fused"})
    forbids: ClassVar[frozenset[str]] = frozenset({"lowered"})
    numerics: ClassVar[Numerics] = Local(1e-2)
    select: Selector = ALL

    def run(self, rw: Rewriter, ctx: Context) -> None:
        def fuse(norm: dict[str, object], quantizer: Quantizer) -> None:
            quantizer.become(
                rw,
                torch.ops.mxfx.norm_quantize.default,
                norm["x"],
                norm["weight"],
                quantizer.matrix,
                quantizer.format,
                norm["eps"],
                norm["offset"],
                norm["gain_first"],
                quantizer.hadamard,
            )

        fuse_sole_quantizers(rw, "rms_norm", self.select, fuse)
