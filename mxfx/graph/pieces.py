"""Rows that a model sorts by expert and cuts where the data says, as one expert linear."""

from __future__ import annotations

from collections.abc import Callable
from operator import getitem

import torch
from torch import fx

from mxfx.graph.fake import runner_of
from mxfx.graph.node import info, kind, set_info
from mxfx.graph.normalize import remove_dead
from mxfx.graph.program import Program

aten = torch.ops.aten


def join_pieces(program: Program) -> None:
    """In a fresh trace: no list of linears over pieces whose lengths only the data knows::

    cat([linear(piece, W[e]) for e, piece in enumerate(split(rows, counts.tolist()))])
    -> expert_linear(rows, W, searchsorted(cumsum(counts), arange(len(rows)), right=True)[:, None])[:, 0]
    """
    joined = False
    for node in list(program.nodes()):
        found = _pieces(node)
        if found is not None:
            node.replace_all_uses_with(_joined(program, node, *found))
            joined = True
    if not joined:
        return
    remove_dead(program.graph)
    stale: set[fx.Node] = set()
    for node in (n for n in program.graph.nodes if n.op == "call_function"):
        if kind(node) == "expert_linear" or not stale.isdisjoint(node.all_input_nodes):
            # Lengths behind the pieces were stated as sums of numbers that only the data knew.
            _refresh(node)
            stale.add(node)


def _joined(program: Program, last: fx.Node, rows: fx.Node, stack: fx.Node, counts: fx.Node) -> fx.Node:
    """The result of all experts before the node ``last``; expert ``e`` takes the next ``counts[e]`` of the rows."""

    def call(target: Callable, *args: object, **kwargs: object) -> fx.Node:
        with program.graph.inserting_before(last):
            node = program.graph.call_function(target, args, kwargs)
        set_info(node, info(last))
        _refresh(node)
        return node

    numbers = call(torch.ops.mxfx.arange.default, rows, 0, call(aten.sym_size.int, rows, 0))
    expert = call(aten.searchsorted.Tensor, call(aten.cumsum.default, counts, 0), numbers, right=True)
    result = call(torch.ops.mxfx.expert_linear.default, rows, stack, call(aten.unsqueeze.default, expert, 1))
    return call(aten.select.int, result, 1, 0)


def _refresh(node: fx.Node) -> None:
    mode = next(n.meta["val"].fake_mode for n in node.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor))
    node.meta["val"] = runner_of(mode).run(node)


def _pieces(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """The rows, the stacked weights and how many rows each expert takes, behind the results of all experts; or None."""
    if node.target is not aten.cat.default or node.args[1:] not in ((), (0,)):
        return None
    parts = node.args[0]
    if not all(part.target is aten.linear.default and len(part.args) == 2 for part in parts):
        return None
    split = _source(getitem, [part.args[0] for part in parts])
    stack = _source(aten.select.int, [part.args[1] for part in parts])
    if split is None or stack is None or split.target is not aten.split_with_sizes.default or stack.op != "get_attr":
        return None
    rows, lengths = split.args[:2]
    if len(lengths) != len(parts) or split.args[2:] not in ((), (0,)):
        return None
    if not all(isinstance(length, fx.Node) and length.target is aten.item.default for length in lengths):
        return None
    counts = _source(getitem, [length.args[0] for length in lengths])
    if counts is None or counts.target is not aten.unbind.int or stack.meta["val"].shape[0] != len(parts):
        return None
    return rows, stack, counts.args[0]


def _source(target: Callable, parts: list) -> fx.Node | None:
    """What the parts are the first, second, … part of by ``target``, along axis 0; None where they are not."""
    first = parts[0].args[0] if parts[0].args else None
    axis = (0,) if target is aten.select.int else ()
    fit = all(part.target is target and part.args == (first, *axis, i) for i, part in enumerate(parts))
    return first if fit and isinstance(first, fx.Node) else None
