"""Which ops move, keep, sum or scale a feature axis; and what a place that must be left alone is."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

import mxfx.ops  # noqa: F401  (registers the dialect)
from mxfx.graph.node import path_of

aten = torch.ops.aten

#: Ops that only move elements: what they do to a feature axis is read off by moving indices through them.
MOVES = frozenset(
    {
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
        aten.transpose.int,
        aten.permute.default,
        aten.slice.Tensor,
        aten.select.int,
        aten.chunk.default,
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.unbind.int,
        aten.squeeze.dim,
        aten.unsqueeze.default,
        aten.flatten.using_ints,
        operator.getitem,
    }
)
#: Ops that return their first operand, element by element.
SAME = frozenset({torch.ops.mxfx.cast.default, aten.clone.default, aten.to.dtype})
SUMS = frozenset({aten.add.Tensor, aten.sub.Tensor})
SCALINGS = frozenset({aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar})
UNARY = frozenset(
    {
        aten.silu.default,
        aten.gelu.default,
        aten.relu.default,
        aten.sigmoid.default,
        aten.tanh.default,
        aten.pow.Tensor_Scalar,
        aten.square.default,
    }
)
PROBE_BATCH, PROBE_SEQ = 2, 3


@dataclass(frozen=True)
class Refusal:
    """A place that a rewrite must leave alone, and why."""

    node: fx.Node
    reason: str


def place_of(node: fx.Node) -> str:
    return path_of(node) or node.name
