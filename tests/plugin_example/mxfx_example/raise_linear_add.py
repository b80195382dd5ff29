"""``raise-linear-add``: linears whose result is added to the residual stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from mxfx.ops.catalogue import spec
from mxfx.rewrite import ALL, Exact, NodePass, Numerics, Rewriter, Selector


@dataclass(frozen=True)
class RaiseLinearAdd(NodePass):
    """Let a linear without bias and the sum that alone reads it be one node.

    Before::

        %y = add(%h, linear(%x, @w))

    After::

        %y = mxfx.linear_add(%x, @w, %h)
    """

    name: ClassVar[str] = "raise-linear-add"
    kinds: ClassVar[tuple[str, ...]] = ("linear",)
    numerics: ClassVar[Numerics] = Exact()
    select: Selector = ALL

    def refuse(self, rw: Rewriter, node: fx.Node) -> str | None:
        readers = list(node.users)
        if spec(node).get("bias") is not None:
            return "it adds a bias"
        if len(readers) != 1 or readers[0].target is not torch.ops.aten.add.Tensor:
            return "it is not read by one sum alone"
        return None

    def rewrite(self, rw: Rewriter, node: fx.Node) -> None:
        (total,) = node.users
        residual = next(operand for operand in total.args if operand is not node)
        linear = spec(node)
        new = rw.call(
            torch.ops.mxfx.linear_add.default,
            linear.get("input"),
            linear.get("weight"),
            residual,
            like=node,
            after=total,
            val=total.meta["val"],
        )
        rw.replace(total, new)
