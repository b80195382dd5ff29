"""Make a fresh trace independent of how it was taken: functional, no asserts, no-op nodes, device or dtype literals."""

from __future__ import annotations

import torch
from torch import fx

from mxfx.graph.errors import TraceError
from mxfx.graph.fake import sizes_text
from mxfx.graph.literals import free_literals
from mxfx.graph.node import op_name, path_of
from mxfx.graph.program import Program

aten = torch.ops.aten

_DROPPED = ("aten._assert_tensor_metadata.default", "aten._assert_async.msg", "aten._assert_scalar.default")
#: Strides are no concern of a program: a view of a value that another device lays out differently is a copy.
_VIEWS = (aten.view.default, aten._unsafe_view.default)
_SAME = (
    aten.alias.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
    aten.contiguous.default,
    aten.clone.default,
)


def normalize(program: Program) -> None:
    """Normalize in place a program that was just traced (design §1). Raises ``TraceError``."""
    graph = program.graph
    for node in list(graph.nodes):
        if op_name(node) in _DROPPED or node.op == "call_module":
            graph.erase_node(node)
    for node in list(graph.nodes):
        if node.target in _SAME or (node.target is aten.dropout.default and node.args[2] is False):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target is aten.copy.default and _alike(*node.args[:2]):
            node.replace_all_uses_with(node.args[1])
            graph.erase_node(node)
        elif node.target is aten.numpy_T.default:
            node.target, axes = aten.permute.default, range(node.meta["val"].dim())
            node.args = (node.args[0], list(reversed(axes)))
        elif node.target in _VIEWS:
            node.target = aten.reshape.default
    _check_functional(graph)
    free_literals(graph)
    remove_dead(graph)


def _alike(one: object, other: object) -> bool:
    """Whether two operands have one shape and dtype: a copy of one over the other then is the one that is copied."""
    vals = [operand.meta.get("val") if isinstance(operand, fx.Node) else None for operand in (one, other)]
    first, second = vals
    if not isinstance(first, torch.Tensor) or not isinstance(second, torch.Tensor):
        return False
    return first.dtype == second.dtype and sizes_text(first) == sizes_text(second)


def _check_functional(graph: fx.Graph) -> None:
    """An op that writes an operand has an effect beside its result: as dead code it would vanish with it."""
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            raise TraceError(
                f"{node.name} = {op_name(node)} ({path_of(node) or 'top level'}) changes its operand and has no "
                "functional form; expected a model whose forward pass writes no tensor that it keeps"
            )


def remove_dead(graph: fx.Graph) -> None:
    """Erase what nobody reads; inputs stay."""
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op not in ("placeholder", "output"):
            graph.erase_node(node)
