"""Products with a stored weight, however a model spells them, as linears: ``Conv1D`` (``addmm``), ``x @ W.T``."""

from __future__ import annotations

import torch
from torch import fx

from mxfx.graph.experts import TRANSPOSED
from mxfx.graph.node import info, operands, set_info
from mxfx.graph.program import Program

aten = torch.ops.aten

_PRODUCTS = (aten.matmul.default, aten.mm.default, aten.addmm.default)
_TURNS = (aten.t.default, aten.mT.default, aten.transpose.int, aten.permute.default)


def settle_linears(program: Program) -> None:
    """In a fresh trace: ``linear(x, W, b)`` for every product of a value with a stored matrix on its right.

    A weight that the model keeps as ``(in, out)`` is stored as a view of it, ``(out, in)``, under a name that says so.
    """
    for node in program.nodes():
        if node.target not in _PRODUCTS:
            continue
        given = list(node.args)
        bias = given.pop(0) if node.target is aten.addmm.default else None
        x, matrix = given[:2]
        weight = _stored(program, matrix)
        if weight is None or (bias is not None and not _is_plain(node, bias)):
            continue
        with program.graph.inserting_before(node):
            new = program.graph.call_function(aten.linear.default, (x, weight) if bias is None else (x, weight, bias))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        program.graph.erase_node(node)


def _is_plain(node: fx.Node, bias: object) -> bool:
    """Whether ``addmm`` adds a stored vector once."""
    given = operands(node)
    stored = isinstance(bias, fx.Node) and bias.op == "get_attr" and bias.meta["val"].dim() == 1
    return stored and given["beta"] == given["alpha"] == 1


def _stored(program: Program, matrix: object) -> fx.Node | None:
    """The node of a weight ``(out, in)`` whose transpose is ``matrix``; None where no stored matrix is behind it."""
    if not isinstance(matrix, fx.Node):
        return None
    if matrix.op == "get_attr" and matrix.meta["val"].dim() == 2:
        return _transposed(program, matrix)
    source = matrix.args[0] if matrix.args else None
    turned = matrix.target in _TURNS and isinstance(source, fx.Node) and source.op == "get_attr"
    if turned and source.meta["val"].dim() == 2 and _swaps(matrix):
        return source
    return None


def _swaps(turn: fx.Node) -> bool:
    if turn.target is aten.permute.default:
        return [int(axis) % 2 for axis in turn.args[1]] == [1, 0]
    return len(turn.args) == 1 or sorted(int(axis) % 2 for axis in turn.args[1:3]) == [0, 1]


def _transposed(program: Program, weight: fx.Node) -> fx.Node:
    name = f"{program.weights.canonical(str(weight.target))}{TRANSPOSED}"
    if name not in program.weights:
        program.weights.add_transposed(str(weight.target), name)
    with program.graph.inserting_after(weight):
        stored = program.graph.create_node("get_attr", name, name=name.replace(".", "_"))
    with weight.meta["val"].fake_mode:
        stored.meta = {"val": weight.meta["val"].mT}
    set_info(stored, info(weight))
    return stored
