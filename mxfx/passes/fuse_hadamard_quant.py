"""``fuse-hadamard-quant``: an online transform and the quantizer behind it as one op."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from mxfx.algorithms.hadamard import DENSE_ORDER, hadamard_matrix
from mxfx.graph.node import kind, path_of
from mxfx.rewrite import ALL, Context, Local, Numerics, Pass, Rewriter, Selector, register
from mxfx.rewrite.quantizer import sole_quantizer


@register
@dataclass(frozen=True)
class FuseHadamardQuant(Pass):
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
    requires: ClassVar[frozenset[str]] = frozenset({"raised"})
    provides: ClassVar[frozenset[str]] = frozenset({"quantizers-fused"})
    forbids: ClassVar[frozenset[str]] = frozenset({"lowered"})
    numerics: ClassVar[Numerics] = Local(1e-2)
    select: Selector = ALL

    def run(self, rw: Rewriter, ctx: Context) -> None:
        for node in rw.program.nodes("hadamard", "block_transform"):
            if not self.select(path_of(node)):
                continue
            quantizer = sole_quantizer(node)
            if isinstance(quantizer, str):
                rw.skip(node, quantizer)
            elif quantizer.matrix is not None:
                rw.skip(node, "its quantizer transforms already")
            elif rw.match(node, note=quantizer.format):
                quantizer.become(rw, *_fused(rw, node, quantizer.format))


def _fused(rw: Rewriter, node: fx.Node, format: str) -> tuple[torch._ops.OpOverload, *tuple[object, ...]]:
    """The op that transforms as ``node`` does and rounds, and its operands."""
    if kind(node) == "hadamard" and node.args[1] > DENSE_ORDER:  # type: ignore[operator]
        return torch.ops.mxfx.hadamard_quantize.default, *node.args[:2], format
    matrix = _matrix(rw, node)
    return torch.ops.mxfx.transform_quantize.default, node.args[0], matrix, format, kind(node) == "hadamard"


def _matrix(rw: Rewriter, node: fx.Node) -> fx.Node:
    """The transform's matrix: its operand, or the stored Hadamard matrix of its order."""
    if kind(node) == "block_transform":
        return node.args[1]  # type: ignore[return-value]
    name = f"hadamard.{node.args[1]}"
    if name in rw.weights:
        return rw.weight(name, node)
    return rw.add_weight(name, hadamard_matrix(int(node.args[1]), torch.float64), node, constant=True)  # type: ignore[call-overload]
