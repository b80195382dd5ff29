"""The only way to change a program: node creation, weights, match accounting and the bisect counter in one place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from mxfx.graph.fake import runner_of
from mxfx.graph.node import NodeInfo, info, path_of, set_info
from mxfx.graph.program import NOMINAL_COMPUTE, NOMINAL_MODEL, Program, Symbol
from mxfx.ops.catalogue import in_schema_order, spec
from mxfx.rewrite.record import Match, PassRecord, Skip


class Rewriter:
    """Edits one program on behalf of one pass.

    Every node that it creates gets a module path, a ``val`` from running the op on fake tensors, and the pass's
    name. ``match`` counts rewrites (the ``m`` of a bisect point ``n.m``) and says whether this one may be done.
    """

    def __init__(self, program: Program, pass_name: str, limit: int | None = None) -> None:
        self.program = program
        self.graph = program.graph
        self.weights = program.weights
        self.pass_name = pass_name
        self.record = PassRecord(pass_name)
        self._limit = limit

    def match(self, node: fx.Node, note: str = "", rule: str = "") -> bool:
        """Count a rewrite at ``node``. False means: leave it alone, the bisect limit is reached."""
        if self._limit is not None and len(self.record.matches) >= self._limit:
            self.record.limited = True
            return False
        index = len(self.record.matches) + 1
        self.record.matches.append(Match(index, node.name, path_of(node), note, rule))
        return True

    def skip(self, node: fx.Node, reason: str, rule: str = "", depth: int = 0, *, done: bool = False) -> None:
        """Record that a candidate stays as it is, and why; ``done`` where nothing is left to do for it."""
        self.record.skips.append(Skip(node.name, path_of(node), reason, rule, depth, done))

    def warn(self, message: str) -> None:
        self.record.warnings.append(message)

    def call(
        self,
        target: Callable,
        *args: object,
        like: fx.Node,
        before: fx.Node | None = None,
        after: fx.Node | None = None,
        val: object = None,
        **kwargs: object,
    ) -> fx.Node:
        """Create a call node that inherits the module path of ``like``; placed before it unless told otherwise.

        ``val`` is the fake result where the caller knows it; else the op runs on the fake values of its operands.
        Operands of mxfx ops that are given by name are put in the order of the schema, where every pass looks.
        """
        args, kwargs = _in_order(target, args, kwargs)
        where = self.graph.inserting_after(after) if after is not None else self.graph.inserting_before(before or like)
        with where:
            node = self.graph.call_function(target, args, kwargs)
        self._adopt(node, like)
        node.meta["val"] = self.run_fake(node) if val is None else val
        return node

    def weight(self, name: str, like: fx.Node, before: fx.Node | None = None) -> fx.Node:
        """A ``get_attr`` node for a weight of the store; one that already stands before the place is reused."""
        place = before or like
        for node in self.graph.nodes:
            if node is place:
                break
            if node.op == "get_attr" and node.target == name:
                return node
        with self.graph.inserting_before(place):
            node = self.graph.create_node("get_attr", name)
        self._adopt(node, like)
        tensor = self.weights[name]
        constant = self.weights.canonical(name) in self.weights.constants
        nominal = NOMINAL_COMPUTE if constant else NOMINAL_MODEL if tensor.is_floating_point() else tensor.dtype
        empty = torch.empty(tensor.shape, dtype=nominal, device="meta")
        node.meta["val"] = self.fake_mode.from_tensor(empty, static_shapes=True)
        return node

    def input(self, name: str, shape: tuple, dtype: torch.dtype) -> fx.Node:
        """A new input of the program behind those that are there; callers may leave it out (None)."""
        last = [n for n in self.graph.nodes if n.op == "placeholder"][-1]
        with self.graph.inserting_after(last):
            node = self.graph.create_node("placeholder", name, (None,))
        set_info(node, NodeInfo(passes=(self.pass_name,)))
        self.record.touched.add(node.name)
        with self.fake_mode:
            node.meta["val"] = torch.empty(shape, dtype=dtype, device="meta")
        return node

    def symbol(self, name: str, low: int, high: int) -> torch.SymInt:
        """A new dynamic dimension, from ``low`` to ``high``."""
        env = self.fake_mode.shape_env
        assert env is not None
        # A hint of its own, or equal sizes would be taken for one.
        hint = min(high, 67 + 2 * len(self.program.symbols))
        # Both are slow to import, and few rewrites make a symbol.
        from torch._dynamo.source import ConstantSource
        from torch.fx.experimental.symbolic_shapes import DimDynamic

        where = ConstantSource(name)
        expression = env.create_symbol(hint, where, dynamic_dim=DimDynamic.DYNAMIC)
        env.constrain_symbol_range(expression, low, high)
        self.program.symbols = (*self.program.symbols, Symbol(name, low, high))
        return env.create_symintnode(expression, hint=hint, source=where)

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Let every user of ``old`` read ``new``; annotations and notes of ``old`` move over."""
        merged = info(new)
        for operand, annotation in info(old).formats.items():
            if operand not in merged.formats:
                merged = merged.with_format(operand, annotation)
        set_info(new, merged)
        for user in list(old.users):
            self.touch(user)
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        self.record.touched.add(new.name)

    def set_operand(self, node: fx.Node, place: int | str, new: fx.Node | None) -> None:
        """Let one operand of ``node``, by position or keyword, be ``new``; operands left out before it get defaults.

        ``spec(node).set(rw, name, new)`` finds the place.
        """
        if isinstance(place, str):
            node.update_kwarg(place, new)
        else:
            given = (*node.args, *list(spec(node).arguments().values())[len(node.args) : place + 1])
            node.args = (*given[:place], new, *given[place + 1 :])
        self.touch(node)

    def retarget(self, node: fx.Node, target: Callable) -> None:
        """Let ``node`` call something that computes the same from the same operands; it keeps its name."""
        node.target = target
        self.touch(node)

    def set_info(self, node: fx.Node, record: NodeInfo) -> None:
        """Change annotations or notes of a node."""
        set_info(node, record)
        self.touch(node)

    def erase(self, node: fx.Node) -> None:
        """Remove a node that nobody reads. Raises ``RuntimeError`` if it still has users."""
        self.graph.erase_node(node)
        self.record.touched.add(node.name)

    def touch(self, node: fx.Node) -> None:
        """Note that this pass changed a node: verifiers look at touched nodes only."""
        self.record.touched.add(node.name)
        record = info(node)
        if self.pass_name not in record.passes:
            set_info(node, replace(record, passes=(*record.passes, self.pass_name)))

    @property
    def fake_mode(self) -> FakeTensorMode:
        for node in self.graph.nodes:
            val = node.meta.get("val")
            if isinstance(val, FakeTensor):
                return val.fake_mode
        raise ValueError("the graph carries no fake tensors: it was not made by mxfx.trace or the IR parser")

    def run_fake(self, node: fx.Node) -> object:
        """Result of a call on the fake values of its operands."""
        return runner_of(self.fake_mode).run_itself(node)

    def _adopt(self, node: fx.Node, like: fx.Node) -> None:
        set_info(node, NodeInfo(path=path_of(like), passes=(self.pass_name,)))
        if "custom" in like.meta:
            node.meta["custom"] = like.meta["custom"]
        self.record.touched.add(node.name)

    def set_weight(
        self, name: str, tensor: Tensor, *, kept_on: torch.device | None = None, was: Tensor | None = None
    ) -> None:
        """Replace a weight (see ``WeightStore.set``); the nodes that read it count as touched."""
        self.weights.set(name, tensor, self.pass_name, kept_on=kept_on, was=was)
        self._touch_readers(name)

    def add_weight(self, name: str, tensor: Tensor, like: fx.Node, *, constant: bool = False) -> fx.Node:
        """Add a new weight, or a ``constant`` that runs in compute precision, and a node that reads it."""
        self.weights.add(name, tensor, self.pass_name, constant=constant)
        return self.weight(name, like)

    def add_rows(self, name: str, source: str, rows: Tensor) -> None:
        """Add a new weight that is the ``rows`` of another one, in its dtype."""
        self.weights.add_rows(name, source, rows, self.pass_name)

    def _touch_readers(self, name: str) -> None:
        home = self.weights.canonical(name)
        for node in self.graph.find_nodes(op="get_attr"):
            if self.weights.canonical(str(node.target)) == home:
                for user in node.users:
                    self.touch(user)
                self.touch(node)


def clean(program: Program) -> None:
    """Remove what nobody reads: dead nodes (placeholders stay) and weights that no node names."""
    for node in reversed(list(program.graph.nodes)):
        if not node.users and node.op not in ("placeholder", "output"):
            program.graph.erase_node(node)
    read = {program.weights.canonical(str(n.target)) for n in program.graph.nodes if n.op == "get_attr"}
    for name in [n for n in program.weights if n not in read]:
        program.weights.drop(name)


def _in_order(target: Callable, args: tuple, kwargs: dict[str, object]) -> tuple[tuple, dict[str, object]]:
    """Operands of an mxfx op as far as possible by position; those of another call as they are."""
    if not kwargs or not isinstance(target, torch._ops.OpOverload) or target.namespace != "mxfx":
        return args, kwargs
    ordered = in_schema_order(target, args, kwargs)
    # The verifier says what is wrong with operands that the schema does not allow.
    return (args, kwargs) if ordered is None else (ordered, {})
