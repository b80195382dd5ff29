"""Products with a stored weight, however a model spells them, as linears: ``Conv1D`` (``addmm``), ``x @ W.T``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from mxfx.graph.experts import TRANSPOSED
from mxfx.graph.fake import runner_of
from mxfx.graph.node import info, operands, set_info
from mxfx.graph.program import Program

aten = torch.ops.aten

_PRODUCTS = (aten.matmul.default, aten.mm.default, aten.addmm.default)
_TURNS = (aten.t.default, aten.mT.default, aten.transpose.int, aten.permute.default)


def settle_linears(program: Program) -> None:
    """In a fresh trace: ``linear(x, W, b)`` for every product of a value with a stored matrix on its right; one with a
    stored matrix on its left, ``W @ x``, is that of ``x.mT``, turned back.

    A weight that the model keeps as ``(in, out)`` is stored as a view of it, ``(out, in)``, under a name that says so.
    """
    for node in program.nodes():
        if node.target not in _PRODUCTS:
            continue
        if node.target is aten.matmul.default and _is_matrix(node.args[0]) and not _is_matrix(node.args[1]):
            _turn(program, node)
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


def _is_matrix(operand: object) -> bool:
    return isinstance(operand, fx.Node) and operand.op == "get_attr" and operand.meta["val"].dim() == 2


def _turn(program: Program, product: fx.Node) -> None:
    """``matmul(W, x)`` as ``linear(x.mT, W).mT``."""
    weight, x = product.args
    assert isinstance(weight, fx.Node) and isinstance(x, fx.Node)
    if x.meta["val"].dim() < 2:
        return
    runner = runner_of(weight.meta["val"].fake_mode)

    def call(target: Callable, *args: object) -> fx.Node:
        with program.graph.inserting_before(product):
            node = program.graph.call_function(target, args)
        node.meta = {"val": runner.run(node)}
        set_info(node, info(product))
        return node

    rows = call(aten.transpose.int, x, -2, -1)
    product.replace_all_uses_with(call(aten.transpose.int, call(aten.linear.default, rows, weight), -2, -1))
    program.graph.erase_node(product)


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
