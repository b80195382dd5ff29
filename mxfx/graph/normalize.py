"""Make a fresh trace independent of how it was taken: no asserts, no-op nodes, device or dtype literals."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from mxfx.graph.node import NodeInfo, op_name, path_of, set_info
from mxfx.graph.program import NOMINAL_COMPUTE, NOMINAL_MODEL, Program
from mxfx.ground.errors import MxfxError

aten = torch.ops.aten

_DROPPED = ("aten._assert_tensor_metadata.default", "aten._assert_async.msg", "aten._assert_scalar.default")
_SAME = (
    aten.alias.default,
    aten.detach.default,
    aten.detach_.default,
    aten.lift_fresh_copy.default,
    aten.contiguous.default,
)
_CASTS = (
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten.to.other,
    aten._to_copy.default,
    aten.type_as.default,
)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class NormalizeError(MxfxError, ValueError):
    """A device or dtype literal that cannot be made independent of the trace."""


def normalize(program: Program) -> None:
    """Normalize in place a program that was just traced (design §1). Raises ``NormalizeError``."""
    graph = program.graph
    for node in list(graph.nodes):
        if op_name(node) in _DROPPED or node.op == "call_module":
            graph.erase_node(node)
    for node in list(graph.nodes):
        if node.target in _SAME:
            _forward(node)
        elif node.target in _CASTS:
            _name_role(graph, node)
    _check_literals(graph)
    _remove_dead(graph)


def _forward(node: fx.Node) -> None:
    node.replace_all_uses_with(node.args[0])
    node.graph.erase_node(node)


def _name_role(graph: fx.Graph, node: fx.Node) -> None:
    """A cast by literal becomes a cast by role, or nothing if it changes nothing."""
    source = node.args[0]
    before, after = source.meta["val"].dtype, node.meta["val"].dtype
    if before == after:
        _forward(node)
        return
    if after not in _FLOATS:
        _replace(graph, node, aten.to.dtype, (source, after))
        return
    role = {NOMINAL_COMPUTE: "compute", NOMINAL_MODEL: "model"}.get(after)
    if role is None:
        raise NormalizeError(f"{node.name} ({path_of(node)}) casts to {after}: neither the model's dtype nor float32")
    _replace(graph, node, torch.ops.mxfx.cast.default, (source, role))


def _replace(graph: fx.Graph, node: fx.Node, target: Callable, args: tuple) -> None:
    with graph.inserting_before(node):
        new = graph.call_function(target, args)
    new.meta = dict(node.meta)
    set_info(new, NodeInfo(path=path_of(node)))
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _check_literals(graph: fx.Graph) -> None:
    for node in graph.nodes:
        literals = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, torch.device)]
        if literals:
            raise NormalizeError(
                f"{node.name} = {op_name(node)} ({path_of(node) or 'top level'}) names the device {literals[0]}; "
                "mxfx cannot make this op independent of the device"
            )
        dtypes = [a for a in (*node.args, *node.kwargs.values()) if a in _FLOATS and isinstance(a, torch.dtype)]
        if dtypes:
            raise NormalizeError(f"{node.name} = {op_name(node)} ({path_of(node)}) names the dtype {dtypes[0]}")


def _remove_dead(graph: fx.Graph) -> None:
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op not in ("placeholder", "output"):
            graph.erase_node(node)
