"""``split-fused``: each part of a fused projection as a linear of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, fx
from torch.ops import aten

from mxfx.graph.node import PART_OF, info, path_of
from mxfx.graph.program import Program
from mxfx.graph.regions import Features, Refusal, features
from mxfx.graph.regions.features import is_matrix
from mxfx.graph.regions.ops import MOVES, place_of
from mxfx.ops.catalogue import spec, weights_of
from mxfx.rewrite import ALL, Close, Context, Numerics, Pass, Rewriter, Selector, register
from mxfx.rewrite.basis import free_name, why_shared
from mxfx.rewrite.facts import ANNOTATED, FUSED_SPLIT, LOWERED, RAISED, WEIGHTS_ROUNDED, Fact, Selected
from mxfx.rewrite.parts import note_parts
from mxfx.rewrite.roles import role_made, roles_remembered


@dataclass(frozen=True)
class Part:
    """One role's share of a fused linear: the value that holds it alone, and which rows of the weight make it."""

    role: str
    value: fx.Node
    found: Features


@register
@dataclass(frozen=True)
class SplitFused(Pass):
    """Give each part of a fused projection a linear of its own, so that rules, solvers and transforms tell them apart.

    Before::

        %y = linear(%x, @qkv_proj.weight)
        %q = slice(%y, 2, 0, 64); %k = slice(%y, 2, 64, 96); %v = slice(%y, 2, 96, 128)

    After::

        %q = linear(%x, @q_proj.weight); %k = linear(%x, @k_proj.weight); %v = linear(%x, @v_proj.weight)

    A part is what plays one role (``q_proj``, ``gate_proj``, see ``mxfx.rewrite.roles``), and gets its name; rules that
    name the fused module still take all of them. Parts may lie interleaved (heads × 3 × head_dim): each weight is made
    of the rows, in whatever order, that its part reads, and the views behind it go with the layout. Rows are cut, never
    inputs, so blocks of a format are as they were. Experts' stacked weights stay as they are. The parts are emitted as
    they are: a product that is joined again sums in another order, its readers copy the slices that are not contiguous,
    and what is saved has one weight a module, which other libraries read by its name.
    """

    name: ClassVar[str] = "split-fused"
    requires: ClassVar[frozenset[Fact]] = frozenset({RAISED})
    provides: ClassVar[frozenset[Fact]] = frozenset({FUSED_SPLIT})
    forbids: ClassVar[frozenset[Fact]] = frozenset({ANNOTATED, WEIGHTS_ROUNDED, LOWERED})
    numerics: ClassVar[Numerics] = Close(1e-12)
    required: ClassVar[bool] = True
    select: Selector = ALL

    def run(self, rw: Rewriter, ctx: Context) -> None:
        taken = {path_of(node) for node in rw.program.graph.nodes}
        with roles_remembered(rw.graph):
            chosen = [(linear, parts_of(linear)) for linear in rw.program.products() if self.select(linear)]
        for linear, found in chosen:
            if found is None:
                continue
            reason = found if isinstance(found, str) else why_shared(rw, linear)
            if reason is not None:
                rw.skip(linear, reason)
                continue
            assert not isinstance(found, str)
            if rw.match(linear, note=", ".join(f"{part.role} {part.found.index.numel()}" for part in found)):
                _split(rw, linear, found, taken)


def parts_of(linear: fx.Node) -> list[Part] | str | None:
    """The parts of a fused linear; why it stays whole; None for one that plays a single role."""
    roles = frozenset().union(*(_roles(user, linear) for user in linear.users if user.target in MOVES))
    if len(roles) < 2:
        return None
    stranger = next((user for user in linear.users if user.target not in MOVES), None)
    if stranger is not None:
        return f"{place_of(stranger)} reads all of it"
    values = list(_values(linear, linear))
    if not is_matrix(linear):
        return "the weight is a stack of matrices: its parts stay together"
    if "in_proj" in roles:
        return "a mixer of tokens reads parts of it: they stay together"
    if "" in roles:
        return f"a part of it plays no role ({next(place_of(v) for v, role in values if not role)})"
    parts = []
    for value, role in values:
        found = features(value)
        if isinstance(found, Refusal):
            return found.reason
        if "," in role:
            return f"{value.name} is read as {role} alike"
        parts.append(Part(role, value, found))
    rows = torch.cat([part.found.index.flatten() for part in parts])
    if not torch.equal(rows.sort().values, torch.arange(linear.meta["val"].shape[-1])):
        return "its parts overlap, or leave some of its rows out"
    return parts


def _values(node: fx.Node, linear: fx.Node) -> Iterator[tuple[fx.Node, str]]:
    """The widest values below ``node`` that play one role each; of one that plays several, the roles after commas."""
    roles = _roles(node, linear)
    moved = [user for user in node.users if user.target in MOVES]
    if len(roles) < 2 or len(moved) < len(node.users):
        yield node, ", ".join(sorted(roles))
        return
    for user in moved:
        yield from _values(user, linear)


def _roles(node: fx.Node, linear: fx.Node) -> frozenset[str]:
    """The roles of whoever reads ``node`` behind ops that only move elements."""
    moved = [user for user in node.users if user.target in MOVES]
    if len(moved) < len(node.users):
        return frozenset({role_made(node, linear)})
    return frozenset().union(*(_roles(user, linear) for user in moved))


def _split(rw: Rewriter, linear: fx.Node, parts: list[Part], taken: set[str]) -> None:
    whole = path_of(linear)
    counted = Counter(part.role for part in parts)
    stored = {operand: str(source.target) for operand, source in weights_of(linear).items()}
    for number, part in enumerate(parts):
        path = f"{whole.rpartition('.')[0]}.{part.role}".removeprefix(".")
        if path in taken or counted[part.role] > 1:
            path = f"{whole}.{part.role}" + (f".{number}" if counted[part.role] > 1 else "")
        taken.add(path)
        rows = part.found.index.flatten()
        new = rw.call(linear.target, *linear.args, like=linear, before=part.value, **linear.kwargs)
        rw.set_info(new, replace(info(new), path=path).with_note(PART_OF, whole))
        for operand, source in stored.items():
            name = free_name(rw, f"{path}.{operand}")
            rw.add_rows(name, source, rows)
            note_parts(rw.program, source, name, rows)
            spec(new).set(rw, operand, rw.weight(name, new))
        new.meta["val"] = rw.run_fake(new)
        rw.replace(part.value, _laid_out(rw, new, part))


def _laid_out(rw: Rewriter, made: fx.Node, part: Part) -> fx.Node:
    """``made``, ``(…, rows)``, in the shape of the part: features apart, axes in their order."""
    value, shape = part.value.meta["val"], part.found.index.shape
    if len(shape) == 1 and _dims(value) == _dims(made.meta["val"]):
        return made
    dynamic = [axis for axis, size in enumerate(value.shape) if not isinstance(size, int)]
    fixed = [axis for axis in range(value.dim()) if axis not in dynamic]
    # Batch comes before the sequence in every product; the part may have them the other way round.
    dynamic.sort(key=lambda axis: _rank(value.shape[axis], made))
    sizes = [_size(rw, part, value.shape[axis]) for axis in dynamic]
    wide = rw.call(aten.reshape.default, made, [*sizes, *shape], like=part.value)
    order = [*dynamic, *fixed]
    if order == sorted(order):
        return wide
    return rw.call(aten.permute.default, wide, [order.index(axis) for axis in range(value.dim())], like=part.value)


def _dims(value: Tensor) -> list[str]:
    return [str(size) for size in value.shape]


def _rank(size: object, made: fx.Node) -> int:
    """Where a symbolic size stands among the leading axes of a product, or of the inputs where rows are flattened."""
    leading = _dims(made.meta["val"])[:-1]
    inputs = next(n for n in made.graph.nodes if n.op == "placeholder")
    known = leading if str(size) in leading else _dims(inputs.meta["val"])
    return known.index(str(size))


def _size(rw: Rewriter, part: Part, size: object) -> fx.Node:
    """A node for a symbolic size: one that the part's own views use, or a new one."""
    for step in part.found.path:
        for source in step.all_input_nodes:
            if str(source.meta["val"]) == str(size):
                return source
    inputs = next(n for n in rw.graph.nodes if n.op == "placeholder")
    axis = _dims(inputs.meta["val"]).index(str(size))
    return rw.call(aten.sym_size.int, inputs, axis, like=part.value)


@FUSED_SPLIT.means
def fused_split(program: Program, selected: Selected) -> str | None:
    with roles_remembered(program.graph):
        fused = next((n for n in program.products() if selected(n) and isinstance(parts_of(n), list)), None)
    return None if fused is None else f"{path_of(fused) or fused.name} still makes several parts"
