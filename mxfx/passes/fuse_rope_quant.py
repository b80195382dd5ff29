"""``fuse-rope-quant``: RoPE and the quantizer behind it as one op."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from mxfx.rewrite import ALL, Context, Local, Numerics, Pass, Rewriter, Selector, register
from mxfx.rewrite.quantizer import Quantizer, fuse_sole_quantizers


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
    provides: ClassVar[frozenset[str]] = frozenset({"quantizers-fused"})
    forbids: ClassVar[frozenset[str]] = frozenset({"lowered"})
    numerics: ClassVar[Numerics] = Local(1e-2)
    select: Selector = ALL

    def run(self, rw: Rewriter, ctx: Context) -> None:
        def fuse(rope: dict[str, object], quantizer: Quantizer) -> None:
            rest = (quantizer.matrix, quantizer.format, quantizer.hadamard)
            quantizer.become(rw, torch.ops.mxfx.rope_quantize.default, rope["x"], rope["cos"], rope["sin"], *rest)

        fuse_sole_quantizers(rw, "rope", self.select, fuse)
