"""Run programs one after another, and compute only what the program before did not.

A pass changes some nodes of a few thousand; what stands around them computes what it computed before the pass. A call
is known by its op, its constants and *the very values* that it reads, so that nothing is taken for unchanged that is
not: a weight counts as another one as soon as it is another tensor or was written in place.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor, fx

from mxfx.graph.execute import CastCache, Observer, call, last_readers
from mxfx.graph.program import Program
from mxfx.graph.weights import version


class _Value(NamedTuple):
    value: object
    number: Hashable


class Replay:
    """Executes programs and keeps the values of the last one, by the calls that made them.

    ``limit`` is in bytes: values beyond it are not kept, and what reads them is computed again.
    """

    def __init__(self, limit: int = 1 << 30) -> None:
        self.limit = limit
        self._casts = CastCache()
        #: Never given twice, so that no call is taken for another whose operands are gone.
        self._count = count()
        self._weights: dict[int, tuple[Tensor, int]] = {}
        self._by_call: dict[Hashable, _Value] = {}
        self._by_name: dict[str, _Value] = {}

    def run(
        self,
        program: Program,
        input_ids: Tensor,
        *,
        observe: Observer | None = None,
        twins: Mapping[str, str] | None = None,
    ) -> Tensor:
        """``execute(program, input_ids, observe=observe)`` without the calls that the last program made as well.

        ``twins`` are names of this program's nodes → names of the last one's that ought to compute the same: where they
        do, bit by bit and in the same order in memory, readers go on from the old value, so that they are known too.
        ``observe`` sees every value; one that was not computed again is the very object that it was before.
        """
        by_call, by_name = self._by_call, self._by_name
        numbers = {id(known.value): known.number for known in by_call.values()}
        twins = twins or {}
        self._by_call, self._by_name = {}, {}
        keep = self._keeper()
        self._number_weights(program)
        given = {"input_ids": input_ids}
        last = last_readers(program.graph)
        env: dict[fx.Node, object] = {}
        numbered: dict[fx.Node, Hashable] = {}
        with torch.no_grad():
            for node in program.graph.nodes:
                if node.op == "output":
                    return env[node.args[0]]
                if node.op == "get_attr":
                    numbered[node] = self._weight(program, str(node.target))
                    continue
                key = _key(program, node, given, numbered)
                found = by_call.get(key) or self._by_call.get(key)
                if found is None:
                    value = self._compute(program, node, env, given)
                    twin = by_name.get(twins.get(node.name, ""))
                    same = twin is not None and _same_bits(value, twin.value)
                    found = twin if same else _Value(value, self._number(value, numbers))
                keep(node, key, found)
                value = found.value if observe is None else observe(node, found.value)
                env[node] = value
                numbered[node] = found.number if value is found.value else self._number(value, numbers)
                for operand in last.get(node, ()):
                    env.pop(operand, None)
        raise ValueError("the graph has no output")

    def _compute(
        self, program: Program, node: fx.Node, env: dict[fx.Node, object], given: Mapping[str, object]
    ) -> object:
        weights = [operand for operand in node.all_input_nodes if operand.op == "get_attr"]
        values = env | {w: call(program, w, env, given, casts=self._casts) for w in weights} if weights else env
        return call(program, node, values, given)

    def _number(self, value: object, numbers: Mapping[int, Hashable]) -> Hashable:
        """One number an object that was kept, and a new one for any other; sizes and None are known by their worth."""
        if not isinstance(value, Tensor | list | tuple):
            return (type(value).__name__, repr(value))
        number = numbers.get(id(value))
        return next(self._count) if number is None else number

    def _keeper(self) -> Callable[[fx.Node, Hashable, _Value], None]:
        left, memory = self.limit, set[int]()

        def keep(node: fx.Node, key: Hashable, found: _Value) -> None:
            nonlocal left
            for tensor in found.value if isinstance(found.value, list | tuple) else (found.value,):
                if isinstance(tensor, Tensor) and (place := tensor.untyped_storage().data_ptr()) not in memory:
                    left -= tensor.untyped_storage().nbytes()
                    if left >= 0:
                        memory.add(place)
            if left >= 0:
                self._by_call[key] = self._by_name[node.name] = found

        return keep

    def _number_weights(self, program: Program) -> None:
        """Those of programs before it are let go."""
        before, tensors = self._weights, list(program.weights.values())
        self._weights = {id(t): before.get(id(t)) or (t, next(self._count)) for t in tensors}
        self._casts.keep_only(tensors)

    def _weight(self, program: Program, name: str) -> Hashable:
        tensor, number = self._weights[id(program.weights[name])]
        return ("weight", number, version(tensor), program.weights.canonical(name) in program.weights.constants)


class _Read(NamedTuple):
    number: Hashable


def _key(
    program: Program, node: fx.Node, given: Mapping[str, object], numbered: Mapping[fx.Node, Hashable]
) -> Hashable:
    if node.op == "placeholder":
        # The caller keeps its tokens.
        return ("input", node.target, id(given.get(str(node.target))))
    read = fx.map_arg((node.args, node.kwargs), lambda operand: _Read(numbered[operand]))
    # Casts and weights take their dtype from the program's.
    return (node.target, program.dtype, repr(read))


def _same_bits(new: object, old: object) -> bool:
    """Equal to the last bit (signed zeros and NaNs too) and laid out alike: what reads one may read the other."""
    if isinstance(new, list | tuple) and isinstance(old, list | tuple):
        return len(new) == len(old) and all(map(_same_bits, new, old))
    if not isinstance(new, Tensor) or not isinstance(old, Tensor):
        return False
    if (new.dtype, new.shape, new.stride(), new.device) != (old.dtype, old.shape, old.stride(), old.device):
        return False
    return torch.equal(bits(new), bits(old))


def bits(x: Tensor) -> Tensor:
    """Integers with the same bits, so that NaNs compare and signed zeros differ; integers as they are."""
    if not x.is_floating_point():
        return x
    return x.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
