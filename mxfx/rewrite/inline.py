"""Inline the ATen definition of a dialect op in place of its node."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor

from mxfx.rewrite.rewriter import Rewriter


class Inliner:
    """Traces definitions once per signature (op, constants, shapes, dtypes) and splices the trace at each node.

    The values in ``meta["val"]`` must have real dtypes: ``lower`` concretizes them first.
    """

    def __init__(self, rw: Rewriter) -> None:
        self._rw = rw
        self._traces: dict[Hashable, fx.Graph] = {}

    def inline(self, node: fx.Node, definition: Callable) -> fx.Node:
        """Replace ``node`` by the body of ``definition`` on its operands; returns the node of the result."""
        operands = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, fx.Node)]
        key = (
            node.target,
            tuple(_signature(a) for a in node.args),
            tuple(sorted((k, _signature(v)) for k, v in node.kwargs.items())),
            # The trace of f(x, x) is not that of f(x, y).
            tuple(operands.index(a) for a in operands),
        )
        if key not in self._traces:
            self._traces[key] = _trace(node, operands, definition)
        result = self._splice(self._traces[key], node, operands)
        self._rw.replace(node, result)
        return result

    def _splice(self, body: fx.Graph, node: fx.Node, operands: list[fx.Node]) -> fx.Node:
        env: dict[fx.Node, fx.Node] = dict(zip((n for n in body.nodes if n.op == "placeholder"), operands, strict=True))
        for inner in body.nodes:
            if inner.op == "placeholder":
                continue
            if inner.op == "output":
                return env[inner.args[0]]
            args, kwargs = fx.map_arg((inner.args, inner.kwargs), lambda n: env[n])
            env[inner] = self._rw.call(inner.target, *args, like=node, val=inner.meta.get("val"), **kwargs)
        raise AssertionError("a traced definition has an output")


def _signature(operand: object) -> Hashable:
    if not isinstance(operand, fx.Node):
        return repr(operand)
    val = operand.meta["val"]
    return (str(val.shape), str(val.stride()), val.dtype) if isinstance(val, torch.Tensor) else str(val)


def _trace(node: fx.Node, operands: list[fx.Node], definition: Callable) -> fx.Graph:
    # Slow to import, and reading a pipeline traces nothing.
    from torch.fx.experimental.proxy_tensor import make_fx

    def body(*values: object) -> torch.Tensor:
        given = dict(zip(operands, values, strict=True))
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: given[n])
        return definition(*args, **kwargs)

    fakes = [operand.meta["val"] for operand in operands]
    mode = next(f for f in fakes if isinstance(f, FakeTensor)).fake_mode
    with mode:
        # make_fx tells operands apart by identity; equal calls may share one fake value.
        fakes = [fake.detach() if isinstance(fake, FakeTensor) else fake for fake in fakes]
    shapes = str([f.shape for f in fakes if isinstance(f, FakeTensor)])
    # The Python dispatcher decomposes on symbolic sizes what torch 2.11 would ask for as numbers.
    with mode, torch.no_grad(), enable_python_dispatcher():
        traced = make_fx(body, tracing_mode="fake", _allow_non_fake_inputs=True)(*fakes)
    if str([f.shape for f in fakes if isinstance(f, FakeTensor)]) != shapes:
        raise ValueError(f"the definition of {node.target} fixes symbolic sizes: {shapes} became those of the example")
    traced.graph.eliminate_dead_code()
    # The strides of a run may differ from the recorded ones, for which a reshape was traced as a view.
    for inner in traced.graph.nodes:
        if inner.target in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
            inner.target = torch.ops.aten.reshape.default
    _drop_device_literals(traced.graph)
    constants = [n for n in traced.graph.nodes if n.op == "get_attr"]
    if constants:
        raise ValueError(f"the definition of {node.target} closes over a constant tensor; pass it as an operand")
    return traced.graph


def _drop_device_literals(graph: fx.Graph) -> None:
    """Constants made on the device of the trace are made on the device of an operand instead."""
    anchor = next(n for n in graph.nodes if n.op == "placeholder" and isinstance(n.meta["val"], torch.Tensor))
    for node in list(graph.nodes):
        if "device" not in node.kwargs:
            continue
        if node.target is not torch.ops.aten.scalar_tensor.default:
            raise ValueError(
                f"the definition makes a tensor by {node.target}; make it from an operand (new_full, ones_like)"
            )
        with graph.inserting_before(node):
            new = graph.call_function(
                torch.ops.aten.new_full.default, (anchor, [], node.args[0]), {"dtype": node.kwargs.get("dtype")}
            )
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
