"""``fold-scale``: multiplications by one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from mxfx.rewrite import ALL, Context, Exact, Numerics, Pass, Rewriter, Selector


@dataclass(frozen=True)
class FoldScale(Pass):
    """Remove multiplications by one, which models without a scale for rotary embeddings carry.

    Before::

        %y = mul(%x, 1.0)

    After::

        %x
    """

    name: ClassVar[str] = "fold-scale"
    numerics: ClassVar[Numerics] = Exact()
    select: Selector = ALL

    def run(self, rw: Rewriter, ctx: Context) -> None:
        for node in rw.program.nodes():
            if node.target is not torch.ops.aten.mul.Tensor or not self.select(node):
                continue
            if node.args[1] != 1.0:
                rw.skip(node, f"it multiplies by {node.args[1]}")
            elif rw.match(node):
                rw.replace(node, node.args[0])
