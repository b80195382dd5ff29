"""Weight arithmetic of changes of basis: float64 on one axis of a weight, through the rewriter."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, fx

from mxfx.algorithms.block_transform import apply_blocks
from mxfx.graph.node import kind, path_of
from mxfx.rewrite.operands import readers_of
from mxfx.rewrite.rewriter import Rewriter

#: A linear map of the last axis, ``x -> x M``, on float64 tensors.
Change = Callable[[Tensor], Tensor]


def change_input(rw: Rewriter, linear: fx.Node, change: Change) -> None:
    """``W <- change(W)`` along the input axis of a linear ``(out, in)`` or the output axis of an embedding."""
    name = rw.program.weight_of(linear)
    rw.set_weight(name, change(rw.weights[name].double()))


def change_output(rw: Rewriter, linear: fx.Node, change: Change) -> None:
    """``y <- change(y)`` for a linear's output, by its rows and its bias."""
    name = rw.program.weight_of(linear)
    rw.set_weight(name, change(rw.weights[name].double().mT).mT.contiguous())
    bias = bias_of(linear)
    if bias is not None:
        rw.set_weight(bias, change(rw.weights[bias].double()))


def bias_of(linear: fx.Node) -> str | None:
    """Name of a linear's bias; None if it has none."""
    if kind(linear) != "linear":
        return None
    bias = linear.args[2] if len(linear.args) > 2 else linear.kwargs.get("bias")
    return str(bias.target) if isinstance(bias, fx.Node) else None


def why_shared(rw: Rewriter, linear: fx.Node, allowed: frozenset[fx.Node] = frozenset()) -> str | None:
    """Why a linear's weight or bias may not change: somebody outside ``allowed`` reads it too. None if nobody does."""
    operand = linear.args[0 if kind(linear) == "embedding" else 1]
    if not isinstance(operand, fx.Node) or operand.op != "get_attr":
        return f"the weight of {path_of(linear) or linear.name} is computed, not stored"
    for name in (str(operand.target), bias_of(linear)):
        if name is None:
            continue
        for reader in readers_of(rw.program, name):
            if reader is not linear and reader not in allowed:
                return f"{name} is read by {path_of(reader) or reader.name} too"
    return None


def untie(rw: Rewriter, node: fx.Node) -> None:
    """Give a linear or embedding a tensor of its own, if it shares one under another name (tied embeddings)."""
    position = 0 if kind(node) == "embedding" else 1
    name = rw.program.weight_of(node)
    names = (name, *rw.weights.tied_to(name))
    if len(names) == 1:
        return
    own = next((n for n in names if n.startswith(f"{path_of(node)}.")), name)
    rest = next(n for n in names if n != own)
    rw.weights.untie(own, rw.pass_name)
    for reader in readers_of(rw.program, own):
        if reader is not node:
            place = 0 if kind(reader) == "embedding" else 1
            rw.set_operand(reader, place, rw.weight(rest, reader))
    rw.set_operand(node, position, rw.weight(own, node))


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
    """``wanted``, or with a number behind it where an earlier pass took the name."""
    name, count = wanted, 1
    while name in rw.weights:
        count += 1
        name = f"{wanted}_{count}"
    return name
