"""The coverage report: which operand of which node is in which format, who said so, and what is not, and why."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from mxfx.formats import Format, parse
from mxfx.graph.node import OPERANDS, info, kind, op_name, operands, path_of
from mxfx.graph.program import Program
from mxfx.rewrite import PassRecord
from mxfx.rewrite.operands import POSITION, is_quantized, is_rounded

#: Where a computed operand stands; weights are in ``POSITION``.
_ACTIVATION = {
    ("linear", "input"): 0,
    ("rms_norm", "input"): 0,
    ("rope", "input"): 0,
    ("silu", "input"): 0,
    ("attention", "q"): 0,
    ("attention", "k"): 1,
    ("attention", "v"): 2,
}


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
class Coverage:
    """The whole report. ``weight_bits`` counts every stored tensor, scales and float ones too, per element."""

    rows: tuple[Row, ...]
    gemms: tuple[Gemm, ...]
    weight_bits: float
    parameters: int

    def table(self) -> str:
        """Markdown: one line an operand, then one a product, then the bits per weight."""
        lines = ["| operand | format | state | set by, or why not |", "|---|---|---|---|"]
        lines += [
            f"| {r.path or r.node} {r.kind}:{r.operand} | {r.format or '–'} | {r.state} | {r.by or r.reason} |"
            for r in self.rows
        ]
        lines += ["", "| product | 4-bit executable | why |", "|---|---|---|"]
        lines += [f"| {g.path or g.node} | {'yes' if g.four_bit else 'no'} | {g.reason} |" for g in self.gemms]
        return "\n".join(
            [*lines, "", f"{self.weight_bits:.3f} bits per weight over {self.parameters:,} parameters", ""]
        )


def coverage(program: Program, records: Sequence[PassRecord] = ()) -> Coverage:
    """The report of a program that is not lowered yet; ``records`` give the reasons of what passes skipped."""
    skipped = {skip.node: f"{record.name}: {skip.reason}" for record in records for skip in record.skips}
    carriers = [n for n in program.graph.nodes if kind(n) in OPERANDS or info(n).formats]
    rows = tuple(row for node in carriers for row in _rows(node, skipped))
    gemms = tuple(_gemm(node) for node in program.nodes("linear")) + tuple(
        product for node in program.nodes("attention") for product in _attention_gemms(node)
    )
    bits, parameters = weight_bits(program)
    return Coverage(rows, gemms, bits / max(parameters, 1), parameters)


def _rows(node: fx.Node, skipped: dict[str, str]) -> Iterable[Row]:
    of_kind = kind(node) or op_name(node)
    for operand in OPERANDS.get(of_kind, tuple(info(node).formats)):
        if not _exists(node, operand):
            continue
        annotation = info(node).formats.get(operand)
        if annotation is None:
            reason = skipped.get(node.name) or _moved(node, operand) or "no rule speaks of it"
            yield Row(node.name, path_of(node), of_kind, operand, "", "", "float", reason)
        else:
            state = _state(node, operand, annotation.format)
            yield Row(node.name, path_of(node), of_kind, operand, str(annotation.format), annotation.by, state)


def _moved(node: fx.Node, operand: str) -> str:
    """Why an operand carries no format although it was rounded: the format moved up, to a rotated value."""
    position = _ACTIVATION.get((kind(node), operand))
    source = node.args[position] if position is not None else None
    if isinstance(source, fx.Node) and _quantizer_format(source) is None and _quantized_above(source):
        return f"rounded in another basis, read behind {op_name(source)}"
    return ""


def _quantizer_format(node: fx.Node) -> str | None:
    """The format that a node rounds to, alone or fused with what comes before; None if it rounds nothing."""
    return str(operands(node)["format"]) if kind(node).endswith("quantize") else None


def _exists(node: fx.Node, operand: str) -> bool:
    position = POSITION.get((kind(node), operand))
    return position is None or (len(node.args) > position and isinstance(node.args[position], fx.Node))


def _state(node: fx.Node, operand: str, fmt: Format) -> str:
    of_kind = kind(node)
    if (of_kind, operand) in POSITION:
        return "rounded" if is_rounded(node, operand) else "annotated"
    if operand == "output":
        return "quantized" if any(is_quantized(u, fmt) for u in node.users) else "annotated"
    position = _ACTIVATION.get((of_kind, operand))
    source = node.args[position] if position is not None else None
    rounded = isinstance(source, fx.Node) and _quantizer_format(source) == str(fmt)
    return "quantized" if rounded else "annotated"


def _gemm(node: fx.Node) -> Gemm:
    problems = [_weight_problem(node), _input_problem(node, "input", 0)]
    reason = "; ".join(p for p in problems if p)
    return Gemm(node.name, path_of(node), not reason, reason or "weight and input on 4-bit grids along the summed axis")


def _weight_problem(node: fx.Node) -> str:
    annotation = info(node).formats.get("weight")
    if annotation is None:
        return "weight is float"
    if not annotation.format.is_four_bit:
        return f"weight is {annotation.format}"
    source = node.args[1]
    if not isinstance(source, fx.Node) or source.op != "get_attr":
        return f"weight is computed by {op_name(source) if isinstance(source, fx.Node) else source}, not stored"
    return "" if is_rounded(node, "weight") else "weight is annotated, not rounded"


def _input_problem(node: fx.Node, operand: str, position: int) -> str:
    """4-bit operands are read straight from a quantizer: anything in between leaves the grid."""
    source = node.args[position]
    rounded = _quantizer_format(source) if isinstance(source, fx.Node) else None
    if not isinstance(source, fx.Node) or rounded is None:
        after = op_name(source) if isinstance(source, fx.Node) else repr(source)
        hidden = isinstance(source, fx.Node) and _quantized_above(source)
        return f"{operand} is read behind {after}, off the grid" if hidden else f"{operand} is float"
    fmt = parse(rounded)
    if not fmt.is_four_bit:
        return f"{operand} is {fmt}"
    axis = operands(source).get("axis", -1)
    return "" if axis in (-1, source.meta["val"].dim() - 1) else f"{operand} has blocks along axis {axis}"


def _quantized_above(node: fx.Node, steps: int = 3) -> bool:
    """Whether a quantizer stands a few single-input ops above (a rotation back, a view)."""
    for _ in range(steps):
        above = [a for a in node.all_input_nodes if a.op == "call_function"]
        if len(above) != 1:
            return False
        (node,) = above
        if _quantizer_format(node) is not None:
            return True
    return False


def _attention_gemms(node: fx.Node) -> Iterable[Gemm]:
    path = path_of(node)
    scores = "; ".join(p for p in (_input_problem(node, "q", 0), _input_problem(node, "k", 1)) if p)
    yield Gemm(node.name, f"{path} (q·k)", not scores, scores or "q and k on 4-bit grids along head_dim")
    probs = "" if "probs" in info(node).formats else "probs is float"
    mixed = "; ".join(
        p for p in (probs, _input_problem(node, "v", 2), "v has blocks along head_dim, the sum runs over seq") if p
    )
    yield Gemm(node.name, f"{path} (probs·v)", False, mixed)


def weight_bits(program: Program) -> tuple[float, int]:
    """Bits and elements of every floating tensor in the store; tied names count once, untied copies twice.

    A tensor is in a format only if each reader has rounded it to that format; else it counts at the model's dtype.
    """
    formats = _stored_formats(program)
    bits, count = 0.0, 0
    for name, tensor in program.weights.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            continue
        fmt = formats.get(name)
        wide = 32 if name in program.weights.constants else program.dtype.itemsize * 8
        bits += tensor.numel() * (wide if fmt is None else fmt.bits_per_element)
        count += tensor.numel()
    return bits, count


def _stored_formats(program: Program) -> dict[str, Format]:
    found: dict[str, set[Format | None]] = {}
    for node in program.graph.nodes:
        for position, operand in enumerate(node.args):
            if not isinstance(operand, fx.Node) or operand.op != "get_attr":
                continue
            role = next((o for (k, o), p in POSITION.items() if k == kind(node) and p == position), "")
            fmt = info(node).formats[role].format if role in info(node).formats and is_rounded(node, role) else None
            found.setdefault(program.weights.canonical(str(operand.target)), set()).add(fmt)
    return {name: fmt for name, seen in found.items() if len(seen) == 1 and (fmt := next(iter(seen))) is not None}


__all__ = ["Coverage", "Gemm", "Row", "coverage", "weight_bits"]
