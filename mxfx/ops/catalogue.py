"""The catalogue: what each op is, said once, for every pass, report and check that asks.

An op of the dialect says it where it is defined (``define(name, operands=…, contracts=…)``), any other op by one
``describe(target, concept, …)``. A pass asks the node, never a table of its own::

    call = spec(node)
    call.concept                  # "linear", "attention", …; "" for an op that nobody described
    call.get("weight")            # an operand by its name here, or by that of the op's schema; defaults filled in
    call.set(rw, "weight", new)   # wherever it stands
    call.carries                  # the operands of this call that can carry a format
    call.axis("weight")           # along which axis the blocks of its format run
    call.contracts                # which operands are multiplied and summed, along which axes
    call.product                  # the contraction with a weight: None where there is none
    call.rounds                   # format and axis, where the call rounds its result
    weights_of(node)              # operand name → the ``get_attr`` node of each weight that it reads

Ask "what does it contract?" (``call.product``), not "is it a linear?": stacked experts, packed codes and ``addmm``
then are one record each, as stacked weights ``(experts, out, in)`` are::

    @define(
        "expert_linear",
        operands=(weight("weight", features=-2), activation("input", "x"), OUTPUT, weight("bias")),
        contracts=(Contraction("input", "weight", over="input channels"),),
    )
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

Target = Callable[..., object]


@dataclass(frozen=True)
class Operand:
    """One operand of an op.

    ``name`` is how passes ask for it; ``argument`` how the op's schema calls it, None for what is no argument: the
    result, or a value inside (attention's probabilities). ``axis`` is the one along which the blocks of its format run,
    None for an operand that carries no format. ``stored`` marks weights; ``features`` is the axis of a weight that
    becomes the last axis of the result. ``read`` is false where only sizes, dtype or device of the operand count.
    """

    name: str
    argument: str | None
    axis: int | None = -1
    stored: bool = False
    features: int | None = None
    read: bool = True


def activation(name: str, argument: str = "", axis: int | None = -1) -> Operand:
    """A computed operand that can carry a format along ``axis`` (None: it carries none)."""
    return Operand(name, argument or name, axis)


def weight(name: str, argument: str = "", axis: int | None = -1, features: int = -1) -> Operand:
    """A stored operand, with blocks along ``axis``; its axis ``features`` becomes the last axis of the result."""
    return Operand(name, argument or name, axis, stored=True, features=features)


def plain(name: str, argument: str = "") -> Operand:
    """An operand that carries no format."""
    return Operand(name, argument or name, None)


def shape_of(name: str, argument: str = "") -> Operand:
    """An operand of which only sizes, dtype or device count, none of its values."""
    return Operand(name, argument or name, None, read=False)


def inside(name: str) -> Operand:
    """A value inside the op that can carry a format, and that no argument gives."""
    return Operand(name, None)


#: The result, which any op may round.
OUTPUT = Operand("output", None)


@dataclass(frozen=True)
class Contraction:
    """A sum of products: ``left`` along ``axes[0]`` with ``right`` along ``axes[1]``, named in words by ``over``.

    Where one of the two is a weight, it is ``right``.
    """

    left: str
    right: str
    axes: tuple[int, int] = (-1, -1)
    over: str = "the last axis"


@dataclass(frozen=True)
class Rounding:
    """The arguments that say how an op rounds its result: its format and, if it has a choice, the axis."""

    format: str = "format"
    axis: str | None = None


@dataclass(frozen=True)
class Rounded:
    """What one call rounds onto: the format's text, and the axis of its blocks, -1 for the last."""

    format: str
    axis: int


@dataclass(frozen=True)
class Record:
    """All that is known of one op.

    ``name`` is the op's own in the dialect. ``definition`` computes it in ATen (None for an op that is ATen itself);
    ``shape`` gives its result on fake tensors where running it would fix symbolic sizes; ``derivative`` replaces that
    of the definition.
    """

    name: str
    target: Target
    concept: str
    operands: tuple[Operand, ...] = ()
    contracts: tuple[Contraction, ...] = ()
    rounds: Rounding | None = None
    definition: Callable[..., Tensor] | None = None
    shape: Callable[..., Tensor] | None = None
    derivative: Callable[..., tuple] | None = None
    by_name: Mapping[str, Operand] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        by_name = {operand.name: operand for operand in self.operands}
        arguments = set(arguments_of(self.target))
        for operand in self.operands:
            if operand.argument is not None and operand.argument not in arguments:
                raise ValueError(
                    f"{self.target} has no argument {operand.argument!r} for the operand {operand.name!r}; "
                    f"it takes {', '.join(arguments_of(self.target))}"
                )
        for contraction in self.contracts:
            for name in (contraction.left, contraction.right):
                if name not in by_name:
                    raise ValueError(f"{self.target} contracts {name!r}, which is no operand: {', '.join(by_name)}")
        object.__setattr__(self, "by_name", MappingProxyType(by_name))


class Editor(Protocol):
    """What ``Spec.set`` needs of a ``Rewriter``."""

    def set_operand(self, node: fx.Node, place: int | str, new: fx.Node | None) -> None: ...


_RECORDS: dict[Target, Record] = {}


def add(record: Record) -> Record:
    """Put a record into the catalogue; a later one of the same op replaces it."""
    _RECORDS[record.target] = record
    return record


def describe(
    target: Target,
    concept: str,
    *,
    operands: tuple[Operand, ...] = (),
    contracts: tuple[Contraction, ...] = (),
    rounds: Rounding | None = None,
    shape: Callable[..., Tensor] | None = None,
) -> Record:
    """Put an op that is not the dialect's own (ATen, or a function of the runtime) into the catalogue."""
    name = getattr(target, "__name__", str(target))
    return add(Record(name, target, concept, operands, contracts, rounds, shape=shape))


def record_of(target: object) -> Record | None:
    """The record of a node's target; None for one that nobody described."""
    return _RECORDS.get(target) if callable(target) else None


def records() -> tuple[Record, ...]:
    """Every record, in the order in which they were made."""
    return tuple(_RECORDS.values())


@dataclass(frozen=True)
class Spec:
    """A record seen from one call of its op."""

    node: fx.Node
    record: Record | None

    @property
    def concept(self) -> str:
        return self.record.concept if self.record is not None else ""

    @property
    def definition(self) -> Callable[..., Tensor] | None:
        return self.record.definition if self.record is not None else None

    @property
    def contracts(self) -> tuple[Contraction, ...]:
        return self.record.contracts if self.record is not None else ()

    @property
    def product(self) -> Contraction | None:
        """The contraction with a weight, as in a linear; None for a call that contracts none."""
        operands = self.record.by_name if self.record is not None else {}
        return next((c for c in self.contracts if operands[c.right].stored), None)

    @cached_property
    def carries(self) -> tuple[str, ...]:
        """Names of the operands that can carry a format; a weight that this call does not have is none of them."""
        operands = self.record.operands if self.record is not None else ()
        return tuple(o.name for o in operands if o.axis is not None and not (o.stored and self.get(o.name) is None))

    @property
    def rounds(self) -> Rounded | None:
        """Format and axis, if the call rounds its result."""
        rounding = self.record.rounds if self.record is not None else None
        if rounding is None:
            return None
        axis = -1 if rounding.axis is None else self.get(rounding.axis)
        val = self.node.meta.get("val")
        if isinstance(val, Tensor) and axis == val.dim() - 1:
            axis = -1
        return Rounded(str(self.get(rounding.format)), axis)

    def has(self, name: str) -> bool:
        """Whether the op has an operand of that name."""
        return self.record is not None and name in self.record.by_name

    def operand(self, name: str) -> Operand:
        """What is known of one operand. Raises ``KeyError`` where the op has none of that name."""
        if self.record is None or name not in self.record.by_name:
            known = ", ".join(self.record.by_name) if self.record is not None else "none: it is not in the catalogue"
            raise KeyError(f"{self.node.name} = {self.node.target} has no operand {name!r}; it has {known}")
        return self.record.by_name[name]

    def axis(self, name: str) -> int | None:
        """The axis along which the blocks of an operand's format run."""
        return self.operand(name).axis

    def get(self, name: str) -> object:
        """An operand: a node, a constant, or None where this call leaves it out or no argument gives it.

        Names that the record does not have are arguments of the op's schema. Raises ``KeyError`` for any other.
        """
        argument = self._argument(name)
        if argument is None:
            return None
        position, default = arguments_of(self.node.target)[argument]
        if position is not None and position < len(self.node.args):
            return self.node.args[position]
        return self.node.kwargs.get(argument, None if default is inspect.Parameter.empty else default)

    def node_of(self, name: str) -> fx.Node | None:
        """An operand that some node computes or reads; None for a constant and for one that is left out."""
        found = self.get(name)
        return found if isinstance(found, fx.Node) else None

    def set(self, rw: Editor, name: str, new: fx.Node | None) -> None:
        """Let the call read ``new`` as that operand. Raises ``KeyError`` for one that is no argument."""
        argument = self._argument(name)
        if argument is None:
            raise KeyError(f"{name!r} of {self.node.target} is no argument: nothing can be put there")
        position, _ = arguments_of(self.node.target)[argument]
        by_name = position is None or argument in self.node.kwargs
        rw.set_operand(self.node, argument if by_name or position is None else position, new)

    def names(self, source: fx.Node) -> tuple[str, ...]:
        """The operands at which this call reads ``source``."""
        operands = self.record.operands if self.record is not None else ()
        return tuple(o.name for o in operands if o.argument is not None and self.get(o.name) is source)

    def reads(self, source: fx.Node) -> bool:
        """Whether the call reads values of ``source``, one of its operands, and not only sizes, dtype or device.

        It does for all that is known, unless its record says otherwise.
        """
        operands = self.record.operands if self.record is not None else ()
        unread = {o.argument for o in operands if not o.read}
        given = [value for name, value in self.arguments().items() if name not in unread] if unread else [source]
        return any(leaf is source for leaf in tree_leaves(given))

    def arguments(self) -> dict[str, object]:
        """Every argument by the name of the op's schema, defaults filled in."""
        return {name: self.get(name) for name in arguments_of(self.node.target)}

    def _argument(self, name: str) -> str | None:
        if self.record is not None and name in self.record.by_name:
            return self.record.by_name[name].argument
        if name in arguments_of(self.node.target):
            return name
        self.operand(name)
        raise AssertionError("operand() raises for an unknown name")


def spec(node: fx.Node) -> Spec:
    """What the catalogue knows of a node; an empty one where it calls nothing, or an op that nobody described."""
    return Spec(node, record_of(node.target) if node.op == "call_function" else None)


def weights_of(node: fx.Node) -> dict[str, fx.Node]:
    """The weights that a call reads: operand name → ``get_attr`` node. A weight that is computed is left out."""
    call = spec(node)
    operands = call.record.operands if call.record is not None else ()
    found = {o.name: call.node_of(o.name) for o in operands if o.stored}
    return {name: source for name, source in found.items() if source is not None and source.op == "get_attr"}


def multiplies(node: fx.Node, source: fx.Node) -> bool:
    """Whether all that a call does with ``source`` is to multiply it by a weight."""
    product = spec(node).product
    return product is not None and spec(node).names(source) == (product.left,)


def in_schema_order(target: Target, args: tuple, kwargs: Mapping[str, object]) -> tuple[object, ...] | None:
    """All operands of a call by position, as far as any is given; None where the schema does not allow it."""
    arguments = arguments_of(target)
    names = [name for name, (position, _) in arguments.items() if position is not None]
    given = dict(zip(names, args, strict=False))
    if set(given) & set(kwargs) or not set(kwargs) <= set(names) or len(args) > len(names):
        return None
    given |= kwargs
    needed = names[: 1 + max((names.index(name) for name in given), default=-1)]
    if any(name not in given and arguments[name][1] is inspect.Parameter.empty for name in needed):
        return None
    return tuple(given.get(name, arguments[name][1]) for name in needed)


@lru_cache(maxsize=4096)
def arguments_of(target: Target) -> Mapping[str, tuple[int | None, object]]:
    """Argument name → its position (None: by name only) and its default (``inspect.Parameter.empty``: none)."""
    if isinstance(target, torch._ops.OpOverload):
        return {
            a.name: (
                None if a.kwarg_only else position,
                a.default_value if a.has_default_value() else inspect.Parameter.empty,
            )
            for position, a in enumerate(target._schema.arguments)
        }
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):  # a builtin without a signature, such as operator.getitem in some versions
        return {}
    return {
        name: (None if p.kind is inspect.Parameter.KEYWORD_ONLY else position, p.default)
        for position, (name, p) in enumerate(parameters.items())
    }


aten = torch.ops.aten

describe(
    aten.linear.default,
    "linear",
    operands=(weight("weight", features=-2), activation("input"), OUTPUT, weight("bias")),
    contracts=(Contraction("input", "weight", over="input channels"),),
)
describe(aten.embedding.default, "embedding", operands=(weight("weight"), plain("indices"), OUTPUT))
describe(aten.layer_norm.default, "layer_norm", operands=(weight("weight"), activation("input"), OUTPUT, plain("bias")))
describe(aten.sym_size.int, "size", operands=(shape_of("input", "self"),))
for _op in (
    *(aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.empty_like.default),
    *(aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.new_empty.default),
):
    describe(_op, "filled", operands=(shape_of("input", "self"),))
for _op in (aten.expand_as.default, aten.view_as.default, aten.type_as.default):
    describe(_op, "shaped", operands=(plain("input", "self"), shape_of("other")))
describe(aten.silu.default, "silu", operands=(activation("input", "self"), OUTPUT))
describe(aten.gelu.default, "gelu", operands=(plain("input", "self"),))
