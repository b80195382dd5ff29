"""Dtypes and devices that a trace wrote into its ops, as roles and operands.

A cast names a role (``mxfx::cast``); an op that casts on the way (``softmax(x, dtype=float32)``) becomes a cast and the
op; a factory (``arange``, ``zeros``, ``full``) makes its tensor on the device of ``input_ids``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map_only

from mxfx.graph.errors import TraceError
from mxfx.graph.node import NodeInfo, op_name, operands, path_of, set_info
from mxfx.graph.program import NOMINAL_COMPUTE, NOMINAL_MODEL

aten = torch.ops.aten

_CASTS = (
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten.to.other,
    aten._to_copy.default,
    aten.type_as.default,
)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_ROLES = {NOMINAL_COMPUTE: "compute", NOMINAL_MODEL: "model"}
#: Operands that say where and how a tensor lies, which follows from the operands that it is made from.
_PLACES = ("device", "layout", "pin_memory", "memory_format")
#: Factories of one value: what fills them, None where an operand says it. Memory that nobody wrote becomes zeros.
_FILLS: dict[torch._ops.OpOverload, float | None] = {
    aten.zeros.default: 0,
    aten.ones.default: 1,
    aten.empty.memory_format: 0,
    aten.full.default: None,
    aten.new_zeros.default: 0,
    aten.new_ones.default: 1,
    aten.new_empty.default: 0,
    aten.new_full.default: None,
}


def free_literals(graph: fx.Graph) -> None:
    """Rewrite every op that names a device or a floating dtype. Raises ``TraceError`` for one that has no other form.

    The values in ``meta["val"]`` are nominal: bfloat16 stands for the model's dtype, float32 for compute precision.
    """
    factories = _Factories(graph)
    for node in list(graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if node.target in _CASTS:
            _name_role(graph, node)
        elif _draws(node):
            raise TraceError(f"{_where(node)} draws random numbers; a program computes the same logits each time")
        elif _literals(node) or node.target in _FILLS:
            _free(graph, node, factories)
        elif node.target is aten.masked_fill.Scalar and _overflows(node.args[2]):
            # A fill raises where a dtype does not hold the number, as float16 the least of bfloat16; this is infinite.
            _replace(graph, node, aten.where.ScalarSelf, (node.args[1], node.args[2], node.args[0]))
    for node in graph.nodes:
        if "val" in node.meta:
            node.meta["val"] = tree_map_only(Tensor, _on_the_device, node.meta["val"])


def _on_the_device(val: Tensor) -> Tensor:
    """The value of an op that the model ran on a CPU whatever its device: a program has one device."""
    if val.device.type == "meta":
        return val
    with val.fake_mode:
        return torch.empty_like(val, device="meta")


def _draws(node: fx.Node) -> bool:
    """Whether a call draws random numbers: attention without a dropout, and dropout itself in eval mode, do not."""
    if torch.Tag.nondeterministic_seeded not in node.target.tags or node.target is aten.dropout.default:
        return False
    return operands(node).get("dropout_p") != 0


def _overflows(number: object) -> bool:
    return isinstance(number, float) and torch.finfo(torch.float16).max < abs(number) < float("inf")


class _Factories:
    """A scalar of each role, and of int64, on the device of the tokens, made at the head of the graph on demand."""

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph
        placeholders = [n for n in graph.nodes if n.op == "placeholder"]
        self.tokens, self._last = placeholders[0], placeholders[-1]
        self._scalars: dict[torch.dtype, fx.Node] = {}

    def scalar(self, like: fx.Node, dtype: torch.dtype) -> fx.Node:
        """A tensor without axes, ``dtype`` one of the nominal ones or int64."""
        if dtype in self._scalars:
            return self._scalars[dtype]
        if dtype == torch.int64:
            made = self._call(aten.new_zeros.default, self.tokens, [])
        else:
            zero = self.scalar(like, torch.int64)
            made = self._call(torch.ops.mxfx.cast.default, zero, _role(like, dtype))
        self._last = made
        set_info(made, NodeInfo())
        _run(made, like)
        self._scalars[dtype] = made
        return made

    def _call(self, target: Callable, *args: object) -> fx.Node:
        with self._graph.inserting_after(self._last):
            return self._graph.call_function(target, args)


def _literals(node: fx.Node) -> bool:
    return any(
        isinstance(a, torch.device) or (isinstance(a, torch.dtype) and a in _FLOATS)
        for a in (*node.args, *node.kwargs.values())
    )


def _name_role(graph: fx.Graph, node: fx.Node) -> None:
    """A cast by literal becomes a cast by role, or nothing if it changes nothing."""
    source = node.args[0]
    before, after = source.meta["val"].dtype, node.meta["val"].dtype
    if before == after:
        node.replace_all_uses_with(source)
        graph.erase_node(node)
    elif after not in _FLOATS:
        _replace(graph, node, aten.to.dtype, (source, after))
    else:
        _replace(graph, node, torch.ops.mxfx.cast.default, (source, _role(node, after)))


def _free(graph: fx.Graph, node: fx.Node, factories: _Factories) -> None:
    names = [a.name for a in node.target._schema.arguments]
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    made = node.meta["val"]
    if node.target in _FILLS:
        fill = _FILLS[node.target]
        value = given["fill_value"] if fill is None else fill
        _fill(graph, node, factories, given["size"], value)
    elif node.target is aten.scalar_tensor.default:
        _fill(graph, node, factories, [], given["s"])
    elif str(node.target).startswith("aten.arange."):
        start, end, step = given.get("start", 0), given["end"], given.get("step", 1)
        if any(isinstance(n, float) and not n.is_integer() for n in (start, end, step)):
            raise TraceError(f"{_where(node)} counts in fractions; expected whole numbers")
        whole = [int(n) if isinstance(n, float) else n for n in (start, end, step)]
        counted = _insert(graph, node, torch.ops.mxfx.arange.default, (factories.tokens, *whole))
        if made.dtype in _FLOATS:
            counted = _insert(graph, node, torch.ops.mxfx.cast.default, (counted, _role(node, made.dtype)))
        elif made.dtype != torch.int64:
            counted = _insert(graph, node, aten.to.dtype, (counted, made.dtype))
        node.replace_all_uses_with(counted)
        graph.erase_node(node)
    elif isinstance(source := next(iter(given.values())), fx.Node) and isinstance(source.meta["val"], Tensor):
        _cast_first(graph, node, given, source)
    else:
        raise TraceError(f"{_where(node)} names a device or dtype; mxfx cannot make this op independent of it")


def _fill(graph: fx.Graph, node: fx.Node, factories: _Factories, size: object, value: object) -> None:
    dtype = node.meta["val"].dtype
    if dtype in _FLOATS:
        anchor = factories.scalar(node, dtype)
        _replace(graph, node, aten.new_full.default, (anchor, size, value))
    else:
        anchor = factories.scalar(node, torch.int64)
        kwargs = {} if dtype == torch.int64 else {"dtype": dtype}
        _replace(graph, node, aten.new_full.default, (anchor, size, value), kwargs)


def _cast_first(graph: fx.Graph, node: fx.Node, given: dict[str, object], source: fx.Node) -> None:
    """An op over a tensor that casts it on the way, or makes another like it: the cast, then the op."""
    kept = {name: value for name, value in given.items() if name not in _PLACES}
    dtype = kept.get("dtype")
    if dtype in _FLOATS:
        assert isinstance(dtype, torch.dtype)
        del kept["dtype"]
        if source.meta["val"].dtype != dtype:
            kept[next(iter(kept))] = _insert(graph, node, torch.ops.mxfx.cast.default, (source, _role(node, dtype)))
    positional = [a.name for a in node.target._schema.arguments if not a.kwarg_only]
    args: list[object] = []
    for name in positional:
        if name not in kept:
            break
        args.append(kept.pop(name))
    _replace(graph, node, node.target, tuple(args), kept)


def _role(node: fx.Node, dtype: torch.dtype) -> str:
    if dtype not in _ROLES:
        raise TraceError(f"{_where(node)} asks for {dtype}: neither the model's dtype nor float32")
    return _ROLES[dtype]


def _insert(graph: fx.Graph, node: fx.Node, target: Callable, args: tuple, kwargs: dict | None = None) -> fx.Node:
    with graph.inserting_before(node):
        new = graph.call_function(target, args, kwargs or {})
    set_info(new, NodeInfo(path=path_of(node)))
    _run(new, node)
    return new


def _replace(graph: fx.Graph, node: fx.Node, target: Callable, args: tuple, kwargs: dict | None = None) -> None:
    with graph.inserting_before(node):
        new = graph.call_function(target, args, kwargs or {})
    new.meta = dict(node.meta)
    set_info(new, NodeInfo(path=path_of(node)))
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _run(new: fx.Node, like: fx.Node) -> None:
    """The fake value of a new node, from those of its operands."""
    args, kwargs = fx.map_arg((new.args, new.kwargs), lambda n: n.meta["val"])
    with like.meta["val"].fake_mode, torch.no_grad():
        new.meta["val"] = new.target(*args, **kwargs)


def _where(node: fx.Node) -> str:
    return f"{node.name} = {op_name(node)} ({path_of(node) or 'top level'})"
