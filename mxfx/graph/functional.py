"""In-place ops of a trace as functional ones, where it is plain who else sees the memory that they write.

``x.div_(y)`` on memory of its own is ``x / y`` for all that reads ``x`` later, ``x[..., a:b].copy_(y)`` a
``slice_scatter``. ``torch.export`` does it for every program, by tracing it anew, which takes longer than the trace
itself: that is for the rest.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator

import torch
from torch import fx

aten = torch.ops.aten


def is_in_place(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def make_functional(graph: fx.Graph) -> bool:
    """Rewrite every in-place op of a fresh trace. False for one that this is not enough for: the graph is spoilt."""
    place = {node: index for index, node in enumerate(graph.nodes)}
    return all(_rewrite(graph, node, place) for node in list(graph.nodes) if is_in_place(node))


def _rewrite(graph: fx.Graph, node: fx.Node, place: dict[fx.Node, int]) -> bool:
    pure, written = _functional_form(node.target), node.args[0] if node.args else None
    if pure is None or not isinstance(written, fx.Node):
        return False
    part = written if written.target is aten.slice.Tensor and node.target is aten.copy_.default else None
    base = written if part is None else part.args[0]
    if (
        not isinstance(base, fx.Node)
        or not _owns_memory(base)
        or (part is not None and (node.users or len(part.users) > 1))
    ):
        return False
    # A view that was taken before and is read behind would have to be taken anew.
    before = [user for user in base.users if place[user] < place[node] and _may_share(user)]
    if any(place[user] > place[node] for view in _and_views(before) for user in view.users):
        return False
    with graph.inserting_before(node):
        new = value = graph.call_function(pure, node.args, dict(node.kwargs))
        place[value] = place[node]
        value.meta = {**node.meta, "val": _result(value, written)}
        if value.meta["val"].dtype != written.meta["val"].dtype:
            # Memory keeps its dtype, whatever the op makes of an operand in a wider one.
            new = value = graph.call_function(aten.to.dtype, (value, written.meta["val"].dtype))
            value.meta = {**node.meta, "val": written.meta["val"]}
        if part is not None:
            new = graph.call_function(aten.slice_scatter.default, (base, value, *part.args[1:]))
            new.meta = {**node.meta, "val": base.meta["val"]}
    place[value] = place[new] = place[node]
    node.replace_all_uses_with(new)
    for user in [user for user in base.users if place[user] > place[node]]:
        user.replace_input_with(base, new)
    graph.erase_node(node)
    return True


def _result(value: fx.Node, written: fx.Node) -> torch.Tensor:
    """What the functional form makes, where operands of other dtypes may widen it."""
    memory: torch.Tensor = written.meta["val"]
    dtypes = {n.meta["val"].dtype for n in value.all_input_nodes if isinstance(n.meta["val"], torch.Tensor)}
    if value.target is aten.copy.default or dtypes == {memory.dtype}:
        return memory
    args, kwargs = fx.map_arg((value.args, value.kwargs), lambda n: n.meta["val"])
    with memory.fake_mode, torch.no_grad():
        made: torch.Tensor = value.target(*args, **kwargs)
    return made


def _functional_form(op: torch._ops.OpOverload) -> torch._ops.OpOverload | None:
    """``div.Tensor`` for ``div_.Tensor``, if the op writes its first operand alone and takes what the other takes."""
    writes = [argument.alias_info is not None and argument.alias_info.is_write for argument in op._schema.arguments]
    name = op._schema.name.split("::")[1]
    packet = getattr(aten, name[:-1], None) if op.namespace == "aten" and name.endswith("_") else None
    if packet is None or writes[:1] != [True] or any(writes[1:]) or op._overloadname not in packet.overloads():
        return None
    found: torch._ops.OpOverload = getattr(packet, op._overloadname)
    same = [a.name for a in found._schema.arguments] == [a.name for a in op._schema.arguments]
    return found if same else None


def _owns_memory(node: fx.Node) -> bool:
    """Whether a value surely lies in memory that no other value of the trace lay in before."""
    if node.target is operator.getitem:
        return isinstance(node.args[0], fx.Node) and _owns_memory(node.args[0])
    return node.op == "call_function" and not _may_share(node)


def _may_share(node: fx.Node) -> bool:
    """Whether a call may return (a part of) what it reads. An op that is made of others does not say so."""
    op, val = node.target, node.meta.get("val")
    if not isinstance(val, torch.Tensor | list | tuple):
        # A number, such as a size.
        return node.op != "call_function"
    if not isinstance(op, torch._ops.OpOverload):
        return True
    if any(returned.alias_info is not None for returned in op._schema.returns):
        return True
    return torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CompositeImplicitAutograd")


def _and_views(nodes: Iterable[fx.Node]) -> Iterator[fx.Node]:
    """Nodes, and what may lie in their memory."""
    for node in nodes:
        yield node
        yield from _and_views(user for user in node.users if _may_share(user))
