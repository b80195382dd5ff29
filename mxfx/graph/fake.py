"""Results of ops on fake tensors: shapes and dtypes without numbers."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import lru_cache
from types import FunctionType, SimpleNamespace

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.weak import WeakIdKeyDictionary

from mxfx.ops import find_op
from mxfx.ops.catalogue import record_of

#: Functions of sizes beside those of ``operator``.
SIZES = SimpleNamespace(sym_max=torch.sym_max, sym_min=torch.sym_min)


class FakeRunner:
    """Runs calls on the fake values of their operands, each distinct call once: layers, passes and pipelines repeat.

    A call is known by its op, the shapes, strides, dtypes and devices of its operands, and its constants. What it
    gives, several nodes may hold.
    """

    def __init__(self, mode: FakeTensorMode) -> None:
        self.mode = mode
        self._known: dict[Hashable, object] = {}
        #: Fake value → its shape, strides, dtype and device in words, which are slow to ask for.
        self._said = WeakIdKeyDictionary()

    def run(self, node: fx.Node) -> object:
        """The fake result of a ``call_function`` node, where the op has a shape rule by that, whose strides may differ.

        Raises what the op raises for operands that do not fit.
        """
        stated = node.meta.get("val")
        # A number that has a symbol keeps it: its readers state it.
        return stated if reads_a_number(node) and stated is not None else self._once(node, self._by_rule)

    def run_itself(self, node: fx.Node) -> object:
        """The fake result of a ``call_function`` node, strides included."""
        return self._once(node, self._itself)

    def converted(self, val: Tensor, dtype: torch.dtype) -> Tensor:
        """``val`` in another dtype."""
        key = (dtype, self._key(val))
        if key not in self._known:
            with self.mode:
                self._known[key] = val.to(dtype)
        return self._known[key]

    def _once(self, node: fx.Node, run: Callable[[fx.Node], object]) -> object:
        if reads_a_number(node) or not _is_one_of_its_name(node.target):
            return run(node)
        key = (run.__name__, node.target, self._key(node.args), self._key(node.kwargs))
        if key not in self._known:
            self._known[key] = run(node)
        return self._known[key]

    def _key(self, operand: object) -> Hashable:
        if isinstance(operand, fx.Node):
            return self._key(operand.meta["val"])
        if isinstance(operand, Tensor):
            known = self._said.get(operand)
            if known is None:
                strides = tuple(map(size_text, operand.stride()))
                known = self._said[operand] = (sizes_text(operand), strides, operand.dtype, operand.device)
            return known
        if isinstance(operand, list | tuple):
            return (type(operand).__name__, *map(self._key, operand))
        if isinstance(operand, dict):
            return tuple((k, self._key(v)) for k, v in operand.items())
        if isinstance(operand, torch.SymInt):
            return ("SymInt", size_text(operand))
        return (type(operand).__name__, str(operand))

    def _by_rule(self, node: fx.Node) -> object:
        args, kwargs = self._operands(node)
        record = record_of(node.target)
        rule = record.shape if record is not None else None
        # Composite ops (linear) meet symbolic sizes only through the Python dispatcher before torch 2.13.
        with self.mode, enable_python_dispatcher(), torch.no_grad():
            return (rule or node.target)(*args, **kwargs)

    def _itself(self, node: fx.Node) -> object:
        args, kwargs = self._operands(node)
        with self.mode, torch.no_grad():
            return node.target(*args, **kwargs)

    def _operands(self, node: fx.Node) -> tuple:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        if reads_a_number(node):
            # Two numbers of equal tensors are two numbers, and a fake value that both have knows one symbol.
            with self.mode:
                args = (args[0].clone(),)
        return args, kwargs


def runner_of(mode: FakeTensorMode) -> FakeRunner:
    """The runner of a trace, which forgets nothing while the trace is there.

    Symbols of another trace may have the same names: what was run for them says nothing here.
    """
    found = getattr(mode, "_mxfx_runner", None)
    if found is None:
        found = mode._mxfx_runner = FakeRunner(mode)
    return found


def _is_one_of_its_name(target: object) -> bool:
    """Whether a target is no closure, of which each call may make another."""
    return isinstance(target, OpOverload) or (isinstance(target, FunctionType) and "<" not in target.__qualname__)


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


__all__ = ["FakeRunner", "fake_mode_of", "runner_of", "size_text", "sizes_text"]
