"""``fuse-hadamard-quant``: an online transform and the quantizer behind it as one op."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from mxfx.algorithms.hadamard import DENSE_ORDER, hadamard_matrix
from mxfx.graph.node import kind
from mxfx.ops.catalogue import spec
from mxfx.rewrite import ALL, Rewriter, Selector, register
from mxfx.rewrite.quantizer import Quantizer, QuantizerFusion, sole_quantizer


@register
@dataclass(frozen=True)
class FuseHadamardQuant(QuantizerFusion):
    """Let one kernel transform each block of the last axis and round the result.

    Before::

        %r  = mxfx.hadamard(%x, 32)            # or mxfx.block_transform(%x, @t)
        %r4 = mxfx.fake_quantize(%r, "mxint4@32", -1)

    After::

        %r4 = mxfx.transform_quantize(%x, @hadamard.32, "mxint4@32", True)
        # of an order above 128, without a stored matrix: mxfx.hadamard_quantize(%x, 4096, "mxint4@32")

    The tensor then crosses memory once instead of twice. Only where nothing else reads the transformed tensor.
    """

    name: ClassVar[str] = "fuse-hadamard-quant"
    kinds: ClassVar[tuple[str, ...]] = ("hadamard", "block_transform")
    select: Selector = ALL

    def quantizer(self, node: fx.Node) -> Quantizer | str:
        found = sole_quantizer(node)
        if isinstance(found, str) or found.matrix is None:
            return found
        return "its quantizer transforms already"

    def fuse(self, rw: Rewriter, node: fx.Node, quantizer: Quantizer) -> None:
        quantizer.become(rw, *_fused(rw, node, quantizer.format))


def _fused(rw: Rewriter, node: fx.Node, format: str) -> tuple[torch._ops.OpOverload, *tuple[object, ...]]:
    """The op that transforms as ``node`` does and rounds, and its operands."""
    x = spec(node).get("input")
    if kind(node) == "block_transform":
        return torch.ops.mxfx.transform_quantize.default, x, spec(node).get("matrix"), format, False
    order = int(spec(node).get("block"))  # type: ignore[call-overload]
    if order > DENSE_ORDER:
        return torch.ops.mxfx.hadamard_quantize.default, x, order, format
    name = f"hadamard.{order}"
    if name in rw.weights:
        matrix = rw.weight(name, node)
    else:
        matrix = rw.add_weight(name, hadamard_matrix(order, torch.float64), node, constant=True)
    return torch.ops.mxfx.transform_quantize.default, x, matrix, format, True
