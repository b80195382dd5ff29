"""Weight arithmetic of changes of basis: float64 on one axis of a weight, through the rewriter."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor, fx

from mxfx.algorithms.block_transform import apply_blocks
from mxfx.graph.node import path_of
from mxfx.ops.catalogue import spec, weights_of
from mxfx.rewrite.operands import readers_of
from mxfx.rewrite.rewriter import Rewriter

#: A linear map of the last axis, ``x -> x M``, on float64 tensors.
Change: TypeAlias = "Callable[[Tensor], Tensor]"


def change_input(rw: Rewriter, node: fx.Node, change: Change) -> None:
    """``W <- change(W)`` along the axis of a weight that is contracted with the input, as ``x M`` for ``x M⁻ᵀ`` asks.

    A weight that nothing is contracted with, an embedding, changes along its features: ``y <- change(y)``.
    """
    product = spec(node).product
    axis = product.axes[1] if product is not None else _features(node, "weight")
    _change(rw, rw.program.weight_of(node), change, axis)


def change_output(rw: Rewriter, node: fx.Node, change: Change) -> None:
    """``y <- change(y)`` along the last axis of the result, by everything stored that makes it: weight and bias."""
    for operand, source in weights_of(node).items():
        _change(rw, str(source.target), change, _features(node, operand))


def _change(rw: Rewriter, name: str, change: Change, axis: int) -> None:
    rw.set_weight(name, change(rw.weights[name].double().movedim(axis, -1)).movedim(-1, axis).contiguous())


def _features(node: fx.Node, operand: str) -> int:
    """The axis of a stored operand that becomes the last axis of the result."""
    axis = spec(node).operand(operand).features
    assert axis is not None
    return axis


def bias_of(node: fx.Node) -> str | None:
    """Name of the bias that a node adds; None if it has none."""
    bias = weights_of(node).get("bias")
    return None if bias is None else str(bias.target)


def why_shared(rw: Rewriter, linear: fx.Node, allowed: frozenset[fx.Node] = frozenset()) -> str | None:
    """Why a linear's weight or bias may not change: somebody outside ``allowed`` reads it too. None if nobody does."""
    stored = weights_of(linear)
    if "weight" not in stored:
        return f"the weight of {path_of(linear) or linear.name} is computed, not stored"
    for name in (str(source.target) for source in stored.values()):
        for reader in readers_of(rw.program, name):
            if reader is not linear and reader not in allowed:
                return f"{name} is read by {path_of(reader) or reader.name} too"
    return None


def untie(rw: Rewriter, node: fx.Node) -> None:
    """Give a linear or embedding a tensor of its own, if it shares one under another name (tied embeddings)."""
    name = rw.program.weight_of(node)
    names = (name, *rw.weights.tied_to(name))
    if len(names) == 1:
        return
    own = next((n for n in names if n.startswith(f"{path_of(node)}.")), name)
    rest = next(n for n in names if n != own)
    rw.weights.untie(own, rw.pass_name)
    for reader in readers_of(rw.program, own):
        if reader is not node:
            spec(reader).set(rw, "weight", rw.weight(rest, reader))
    spec(node).set(rw, "weight", rw.weight(own, node))


def change_columns(rw: Rewriter, linear: fx.Node, columns: Tensor, blocks: Tensor) -> None:
    """``W[:, columns] <- W[:, columns] @ blocks``, head by head.

    ``columns`` is ``(heads, head_dim)``; ``blocks`` ``(heads, head_dim / block, block, block)``, float64.
    """
    name = rw.program.weight_of(linear)
    weight = rw.weights[name].double().clone()
    weight[:, columns.flatten()] = _by_block(weight[:, columns.flatten()], blocks)
    rw.set_weight(name, weight)


def change_rows(rw: Rewriter, linear: fx.Node, rows: Tensor, blocks: Tensor) -> None:
    """``y[rows] <- y[rows] @ blocks`` for a linear's output, by weight and bias; shapes as for columns."""
    name, bias = rw.program.weight_of(linear), bias_of(linear)
    flat = rows.flatten()
    weight = rw.weights[name].double().clone()
    weight[flat] = _by_block(weight[flat].mT, blocks).mT
    rw.set_weight(name, weight)
    if bias is not None:
        vector = rw.weights[bias].double().clone()
        vector[flat] = _by_block(vector[flat], blocks)
        rw.set_weight(bias, vector)


def _by_block(x: Tensor, blocks: Tensor) -> Tensor:
    return apply_blocks(x, blocks.flatten(0, 1).to(x.device))


def free_name(rw: Rewriter, wanted: str) -> str:
    """``wanted``, or with a number behind it where an earlier pass took the name.

    A tensor has no members: under the name of stacked weights, which is their own, ``.bias`` becomes ``_bias``.
    """
    owner, _, leaf = wanted.rpartition(".")
    wanted = f"{owner}_{leaf}" if owner in rw.weights else wanted
    name, count = wanted, 1
    while name in rw.weights:
        count += 1
        name = f"{wanted}_{count}"
    return name
