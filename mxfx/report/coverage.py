"""The coverage report: which operand of which node is in which format, who said so, and what is not, and why."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import fx

from mxfx.formats import Format, parse
from mxfx.graph.node import info, op_name, path_of
from mxfx.graph.program import Program
from mxfx.ops.catalogue import Contraction, Spec, spec, weights_of
from mxfx.rewrite import PassRecord
from mxfx.rewrite.operands import is_quantized, is_rounded
from mxfx.rewrite.size import Multiplied, multiplied, weight_bits


@dataclass(frozen=True)
class Row:
    """One operand of a node of some ``kind`` (``linear``, ``rope`` …).

    ``by`` is who set the format; ``state`` is ``quantized``, ``rounded``, ``annotated`` or ``float``.
    """

    node: str
    path: str
    kind: str
    operand: str
    format: str
    by: str
    state: str
    reason: str = ""


@dataclass(frozen=True)
class Gemm:
    """One matrix product: can it run on 4-bit operands, and if not, why."""

    node: str
    path: str
    four_bit: bool
    reason: str


@dataclass(frozen=True)
class RoleShare:
    """The weights of one role that the program multiplies by: how many, their elements, and those on a grid."""

    role: str
    count: int
    elements: int
    rounded: int

    @property
    def share(self) -> float:
        """The part of the elements that is on a grid."""
        return self.rounded / max(self.elements, 1)


@dataclass(frozen=True)
class Coverage:
    """The whole report. ``weight_bits`` counts every stored tensor, scales and float ones too, per element."""

    rows: tuple[Row, ...]
    gemms: tuple[Gemm, ...]
    weight_bits: float
    parameters: int
    roles: tuple[RoleShare, ...] = ()

    def table(self) -> str:
        """Markdown: one line an operand, then one a product, then the bits per weight."""
        lines = ["| operand | format | state | set by, or why not |", "|---|---|---|---|"]
        lines += [
            f"| {r.path or r.node} {r.kind}:{r.operand} | {r.format or '–'} | {r.state} | {r.by or r.reason} |"
            for r in self.rows
        ]
        lines += ["", "| product | 4-bit executable | why |", "|---|---|---|"]
        lines += [f"| {g.path or g.node} | {'yes' if g.four_bit else 'no'} | {g.reason} |" for g in self.gemms]
        lines += ["", "| weights multiplied by | × | elements | on a grid |", "|---|---|---|---|"]
        lines += [
            f"| {r.role} | {r.count} | {r.elements:,} | {r.rounded / max(r.elements, 1):.1%} |" for r in self.roles
        ]
        return "\n".join(
            [*lines, "", f"{self.weight_bits:.3f} bits per weight over {self.parameters:,} parameters", ""]
        )


def coverage(program: Program, records: Sequence[PassRecord] = ()) -> Coverage:
    """The report of a program that is not lowered yet; ``records`` give the reasons of what passes skipped."""
    skipped = {skip.node: f"{record.name}: {skip.reason}" for record in records for skip in record.skips}
    rows = tuple(row for node in program.graph.nodes for row in _rows(node, skipped))
    gemms = tuple(_gemm(spec(node), c) for node in program.graph.nodes for c in spec(node).contracts)
    bits, parameters = weight_bits(program)
    return Coverage(rows, gemms, bits / max(parameters, 1), parameters, _roles(program))


def _roles(program: Program) -> tuple[RoleShare, ...]:
    """Every contraction with a weight, stacks of experts and computed weights among them, by role."""
    found: dict[str, list[Multiplied]] = {}
    for one in multiplied(program):
        found.setdefault(one.role or "no role", []).append(one)
    return tuple(
        RoleShare(
            role,
            len(ones),
            sum(one.elements for one in ones),
            sum(one.elements for one in ones if is_rounded(one.node, "weight")),
        )
        for role, ones in found.items()
    )


def _rows(node: fx.Node, skipped: dict[str, str]) -> Iterable[Row]:
    call = spec(node)
    of_kind = call.concept or op_name(node)
    for operand in call.carries or tuple(info(node).formats):
        annotation = info(node).formats.get(operand)
        if annotation is None:
            reason = skipped.get(node.name) or _moved(call, operand) or "no rule speaks of it"
            yield Row(node.name, path_of(node), of_kind, operand, "", "", "float", reason)
        else:
            state = _state(call, operand, annotation.format)
            yield Row(node.name, path_of(node), of_kind, operand, str(annotation.format), annotation.by, state)


def _moved(call: Spec, operand: str) -> str:
    """Why an operand carries no format although it was rounded: the format moved up, to a rotated value."""
    source = None if call.has(operand) and call.operand(operand).stored else _source(call, operand)
    if source is not None and spec(source).rounds is None and _quantized_above(source):
        return f"rounded in another basis, read behind {op_name(source)}"
    return ""


def _source(call: Spec, operand: str) -> fx.Node | None:
    return call.node_of(operand) if call.has(operand) else None


def _state(call: Spec, operand: str, fmt: Format) -> str:
    if call.has(operand) and call.operand(operand).stored:
        return "rounded" if is_rounded(call.node, operand) else "annotated"
    if operand == "output":
        return "quantized" if any(is_quantized(u, fmt) for u in call.node.users) else "annotated"
    source = _source(call, operand)
    rounded = spec(source).rounds if source is not None else None
    return "quantized" if rounded is not None and rounded.format == str(fmt) else "annotated"


def _gemm(call: Spec, contraction: Contraction) -> Gemm:
    pair = (
        (contraction.right, contraction.left) if call.product is contraction else (contraction.left, contraction.right)
    )
    axes = dict(zip((contraction.left, contraction.right), contraction.axes, strict=True))
    reason = "; ".join(problem for name in pair for problem in _problems(call, name, axes[name], contraction.over))
    path = path_of(call.node)
    if len(call.contracts) > 1:
        path = f"{path} ({contraction.left}·{contraction.right})"
    return Gemm(
        call.node.name, path, not reason, reason or f"{' and '.join(pair)} on 4-bit grids along {contraction.over}"
    )


def _problems(call: Spec, name: str, axis: int, over: str) -> Iterable[str]:
    """Why an operand of a product is not in 4 bits along the axis that is summed over."""
    operand = call.operand(name)
    if operand.stored:
        problem = _weight_problem(call, name)
    elif operand.argument is None:
        # Such a value exists only inside the op: to round it, expand-attention spells the op out.
        problem = f"{name} is float" if name not in info(call.node).formats else f"{name} is not spelled out"
    else:
        problem = _input_problem(call, name)
    if problem:
        yield problem
    if operand.axis is not None and operand.axis != axis:
        yield f"blocks of {name} run along axis {operand.axis}, the sum over {over}"


def _weight_problem(call: Spec, name: str) -> str:
    annotation = info(call.node).formats.get(name)
    if annotation is None:
        return f"{name} is float"
    if not annotation.format.is_four_bit:
        return f"{name} is {annotation.format}"
    source = call.get(name)
    if name not in weights_of(call.node):
        return f"{name} is computed by {op_name(source) if isinstance(source, fx.Node) else source}, not stored"
    return "" if is_rounded(call.node, name) else f"{name} is annotated, not rounded"


def _input_problem(call: Spec, name: str) -> str:
    """4-bit operands are read straight from a quantizer: anything in between leaves the grid."""
    source = call.get(name)
    rounded = spec(source).rounds if isinstance(source, fx.Node) else None
    if rounded is None:
        after = op_name(source) if isinstance(source, fx.Node) else repr(source)
        hidden = isinstance(source, fx.Node) and _quantized_above(source)
        return f"{name} is read behind {after}, off the grid" if hidden else f"{name} is float"
    fmt = parse(rounded.format)
    if not fmt.is_four_bit:
        return f"{name} is {fmt}"
    return "" if rounded.axis == call.axis(name) else f"{name} has blocks along axis {rounded.axis}"


def _quantized_above(node: fx.Node, steps: int = 3) -> bool:
    """Whether a quantizer stands a few single-input ops above (a rotation back, a view)."""
    for _ in range(steps):
        above = [a for a in node.all_input_nodes if a.op == "call_function"]
        if len(above) != 1:
            return False
        (node,) = above
        if spec(node).rounds is not None:
            return True
    return False


__all__ = ["Coverage", "Gemm", "RoleShare", "Row", "coverage"]
