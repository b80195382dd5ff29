"""Steps of decoding on a CPU, written down once and played: kernels are called on fixed memory, views cost nothing."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from mxfx.ops.kernels import few_rows
from mxfx.ops.kernels.calls import Call, recorded


class Tape(fx.Interpreter):
    """What running a graph once on given tensors did, to be done again on what then lies in them.

    Every value keeps its memory. A node is played as the one C kernel that it called (as itself where that fails), as
    nothing where its value is a view or a number, and else as itself, its value copied to where it lay.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph, garbage_collect_values=False)
        self.played: list[Callable[[], object]] = []
        self._known: set[int] = set()

    def record(self, *args: Any) -> Any:
        """Run the graph; what it returns lies where ``play`` will put it."""
        # A run that was interrupted left notes of memory that is gone.
        self.played.clear()
        self._known.clear()
        self._known.update(map(_memory, filter(_is_tensor, args)))
        return self.run(*args)

    def play(self) -> None:
        for one in self.played:
            one()

    def run_node(self, n: fx.Node) -> Any:
        with recorded() as calls:
            result = super().run_node(n)
        if n.op == "call_function":
            self._note(n, result, calls)
        self._known.update(map(_memory, filter(_is_tensor, tree_leaves(result))))
        return result

    def call_function(self, target: Any, args: tuple, kwargs: dict) -> Any:
        if target is torch.ops.aten.linear.default:
            found = few_rows.linear(*args, **kwargs)
            if found is not NotImplemented:
                return found
        return super().call_function(target, args, kwargs)

    def _note(self, n: fx.Node, result: Any, calls: list[Call]) -> None:
        values = list(filter(_is_tensor, tree_leaves(result)))
        schema = getattr(n.target, "_schema", None)
        writes = schema.is_mutable if schema is not None else bool(getattr(n.target, "mutates", ()))
        kernel = len(calls) == 1 and calls[0].result is result and self._reads_known(calls[0])
        if kernel or writes or any(_memory(value) not in self._known for value in values):
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            again = _again(n.target, args, kwargs, values)
            self.played.append(_kernel(calls[0], again) if kernel else again)

    def _reads_known(self, call: Call) -> bool:
        """Whether a kernel read values of the graph, not copies that were made of them on the way."""
        return all(_memory(tensor) in self._known for tensor in call.reads)


def _kernel(call: Call, otherwise: Callable[[], object]) -> Callable[[], object]:
    """A kernel's call; what it took once it may refuse of other numbers (a NaN lies on no grid)."""
    function, arguments = call.function, call.arguments

    def one() -> None:
        if function(*arguments):
            otherwise()

    return one


def _again(target: Any, args: tuple, kwargs: dict, values: list[Tensor]) -> Callable[[], object]:
    """A call that puts the values of a node where they lie."""
    into = _into(target)
    if into is not None and len(values) == 1:
        return partial(into, *args, **kwargs, out=values[0])

    def one() -> None:
        for value, new in zip(values, filter(_is_tensor, tree_leaves(target(*args, **kwargs))), strict=True):
            if value is not new:
                value.copy_(new)

    return one


@cache
def _into(target: Any) -> torch._ops.OpOverload | None:
    """The overload of an ATen op that is given where to put its result."""
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return None
    wanted = [(a.name, str(a.type)) for a in target._schema.arguments]
    for name in target._overloadpacket.overloads():
        found = getattr(target._overloadpacket, name)
        given = [(a.name, str(a.type)) for a in found._schema.arguments]
        if given == [*wanted, ("out", "Tensor")]:
            return found
    return None


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class TapedStep:
    """A step on the tensors of one storage, as ``RecordedStep`` on a GPU."""

    def __init__(self, graph: fx.GraphModule) -> None:
        self._tape = Tape(graph)
        self._logits: Tensor | None = None

    def __call__(self, inputs: dict[str, Tensor]) -> Tensor:
        """Logits of what lies in ``inputs``: the same tensors in every call."""
        # Made for inference, what is recorded could not be written to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            if self._logits is None:
                names = [n.target for n in self._tape.graph.nodes if n.op == "placeholder"]
                self._logits = self._tape.record(*(inputs.get(str(name)) for name in names))
            else:
                self._tape.play()
        return self._logits.clone()
