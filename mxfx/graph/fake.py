"""Results of ops on fake tensors: shapes and dtypes without numbers."""

from __future__ import annotations

from collections.abc import Hashable
from functools import lru_cache
from types import SimpleNamespace

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from mxfx.ops import find_op
from mxfx.ops.catalogue import record_of

#: Functions of sizes beside those of ``operator``.
SIZES = SimpleNamespace(sym_max=torch.sym_max, sym_min=torch.sym_min)


class FakeRunner:
    """Runs calls on the fake values of their operands, each distinct call once: layers repeat.

    A call is known by its op, the shapes, strides and dtypes of its operands, and its constants.
    """

    def __init__(self, mode: FakeTensorMode) -> None:
        self.mode = mode
        self._known: dict[Hashable, object] = {}
        #: Fake value by identity, held → its shape, strides and dtype in words, which are slow to ask for.
        self._said: dict[int, tuple[Tensor, Hashable]] = {}

    def run(self, node: fx.Node) -> object:
        """The fake result of a ``call_function`` node. Raises what the op raises for operands that do not fit."""
        if reads_a_number(node):
            # Two numbers of equal tensors are two numbers, and one that has a symbol keeps it: its readers state it.
            stated = node.meta.get("val")
            return self._run(node) if stated is None else stated
        key = (node.target, self._key(node.args), self._key(node.kwargs))
        if key not in self._known:
            self._known[key] = self._run(node)
        return self._known[key]

    def _key(self, operand: object) -> Hashable:
        if isinstance(operand, fx.Node):
            return self._key(operand.meta["val"])
        if isinstance(operand, Tensor):
            known = self._said.get(id(operand))
            if known is None or known[0] is not operand:
                said = (sizes_text(operand), tuple(map(size_text, operand.stride())), operand.dtype)
                known = self._said[id(operand)] = (operand, said)
            return known[1]
        if isinstance(operand, list | tuple):
            return (type(operand).__name__, *map(self._key, operand))
        if isinstance(operand, dict):
            return tuple((k, self._key(v)) for k, v in operand.items())
        if isinstance(operand, torch.SymInt):
            return ("SymInt", size_text(operand))
        return (type(operand).__name__, str(operand))

    def _run(self, node: fx.Node) -> object:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        record = record_of(node.target)
        rule = record.shape if record is not None else None
        # Composite ops (linear) meet symbolic sizes only through the Python dispatcher before torch 2.13.
        with self.mode, enable_python_dispatcher(), torch.no_grad():
            return (rule or node.target)(*args, **kwargs)


def has_dtype_of_its_own(node: fx.Node) -> bool:
    """Whether ATen makes numbers of integers, in float32 whatever the model's dtype."""
    val = node.meta["val"]
    if not isinstance(node.target, OpOverload) or find_op(node.target) is not None or not isinstance(val, Tensor):
        return False
    read = [given for source in node.all_input_nodes if isinstance(given := source.meta["val"], Tensor)]
    return val.is_floating_point() and not any(x.is_floating_point() or x.is_complex() for x in read)


def reads_a_number(node: fx.Node) -> bool:
    """Whether the node's result is a number that its tensor holds, of which fake tensors know only a symbol."""
    return node.target is torch.ops.aten.item.default


def size_text(size: object) -> str:
    """A dimension as text, ``7`` or ``s27 + 1``: printing a symbolic expression is slow, so each is printed once."""
    if isinstance(size, int):
        return str(size)
    expression = getattr(getattr(size, "node", None), "expr", None)
    return str(size) if expression is None else _printed(expression)


def sizes_text(tensor: Tensor) -> tuple[str, ...]:
    """``size_text`` of every dimension."""
    return tuple(map(size_text, tensor.shape))


@lru_cache(maxsize=4096)
def _printed(expression: object) -> str:
    return str(expression)


def fake_mode_of(graph: fx.Graph) -> FakeTensorMode | None:
    """The mode of the graph's fake values; None if it has none."""
    vals = (n.meta.get("val") for n in graph.nodes)
    return next((v.fake_mode for v in vals if isinstance(v, FakeTensor)), None)


__all__ = ["FakeRunner", "fake_mode_of", "size_text", "sizes_text"]
