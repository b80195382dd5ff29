"""A program as text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from mxfx.graph.fake import size_text
from mxfx.graph.mutation import written
from mxfx.graph.node import META_KEY, NodeInfo, info, path_of
from mxfx.graph.program import Program
from mxfx.graph.text.words import DTYPES, MODULES, OUTSIDE, VERSION


def to_text(program: Program, *, header: bool = True) -> str:
    """The program as text that ``parse`` reads back; without ``header`` the graph alone.

    Values in notes that JSON cannot say are written by their ``repr`` and come back as strings.
    """
    return str(Printout.of(program)) if header else "\n".join(["graph", *_sections(Printer().lines(program))]) + "\n"


@dataclass(frozen=True)
class Printout:
    """A program's lines, printed once for all who read them: text, differences."""

    header: list[str]
    graph: list[Line]

    @classmethod
    def of(cls, program: Program) -> Printout:
        return Printer().print(program)

    def __str__(self) -> str:
        return "\n".join([*self.header, "graph", *_sections(self.graph)]) + "\n"


@dataclass(frozen=True)
class Line:
    """One node, printed: ``text`` stands in the section ``path``; ``name`` is the node's."""

    name: str
    path: str
    text: str


class Printer:
    """Prints programs that come from each other: a node that is as it was is not put into words again."""

    def __init__(self) -> None:
        self._symbols: dict[str, str] = {}
        self._lines: dict[str, tuple[tuple, Line]] = {}

    def print(self, program: Program) -> Printout:
        return Printout(header_lines(program), self.lines(program))

    def lines(self, program: Program) -> list[Line]:
        """Every node but ``get_attr``, which is printed where it is read, as ``@name``."""
        symbols = symbol_names(program)
        known = self._lines if symbols == self._symbols else {}
        lines: dict[str, tuple[tuple, Line]] = {}
        for node in program.graph.nodes:
            if node.op != "get_attr":
                reads = _reads(node)
                before = known.get(node.name)
                kept = before is not None and before[0] == reads
                lines[node.name] = before if kept else (reads, Line(node.name, path_of(node), _node(node, symbols)))
        self._symbols, self._lines = symbols, lines
        return [line for _, line in lines.values()]


class _Same:
    """Equal to what holds the very same object: values and records are replaced, never changed."""

    def __init__(self, held: object) -> None:
        self._held = held

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._held is other._held


def _reads(node: fx.Node) -> tuple:
    """All that a node's line says, in a form that is quicker made than the line."""
    weights = [str(operand.target) for operand in node.all_input_nodes if operand.op == "get_attr"]
    record = _Same(node.meta.get(META_KEY)), _Same(node.meta.get("val"))
    return (node.op, node.target, repr(node.args), repr(node.kwargs), weights, *record)


def header_lines(program: Program) -> list[str]:
    """Everything above the graph."""
    source = program.source
    lines = [f"mxfx-ir {VERSION}", f"source {json.dumps(source.name, ensure_ascii=False)} {source.architecture}"]
    lines.append(f"config {_json(source.config)}")
    lines.append(f"dtype {_dtype_name(program.dtype)}")
    ranges = [f"{s.name} in [{s.low}, {s.high}]" for s in program.symbols]
    lines += [f"symbols {', '.join(ranges)}"] if ranges else []
    lines += [f"facts {', '.join(sorted(program.facts))}"] if program.facts else []
    lines += [f"notes {_json(program.notes)}"] if program.notes else []
    return [*lines, "weights", *weight_lines(program)]


def weight_lines(program: Program) -> list[str]:
    """One line a tensor, in the order of the store, then one an alias."""
    store = program.weights
    lines = []
    for name, tensor in store.items():
        constant = " constant" if name in store.constants else ""
        shape = ", ".join(map(str, tensor.shape))
        lines.append(f"  @{name} : {_dtype_name(tensor.dtype)}[{shape}] #{store.hash(name)}{constant}")
    return lines + [f"  @{alias} = @{home}" for alias, home in store.aliases.items()]


def symbol_names(program: Program) -> dict[str, str]:
    """Symbol of the shape environment → name in the program's header, by the dimensions of the inputs."""
    found: dict[str, None] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder" and isinstance(node.meta.get("val"), Tensor):
            found |= {str(d): None for d in node.meta["val"].shape if str(d).isidentifier()}
    return dict(zip(found, (s.name for s in program.symbols), strict=False))


def type_text(val: object, names: Mapping[str, str]) -> str:
    """``bf16[batch, seq, 64]`` for a fake tensor, ``sym(batch)`` for a symbolic number."""
    if isinstance(val, Tensor):
        return f"{_dtype_name(val.dtype)}[{', '.join(_dim(d, names) for d in val.shape)}]"
    if isinstance(val, list | tuple):
        return f"({', '.join(type_text(v, names) for v in val)})"
    return f"sym({_dim(val, names)})" if val is not None else "?"


def _dim(size: object, names: Mapping[str, str]) -> str:
    text = size_text(size)
    return text if text.isdigit() else _SYMBOL_NAME.sub(lambda m: names.get(m[0], m[0]), text)


_SYMBOL_NAME = re.compile(r"[A-Za-z_]\w*")


def _sections(lines: list[Line]) -> list[str]:
    result: list[str] = []
    path = OUTSIDE
    for line in lines:
        if line.path != path:
            path = line.path
            result.append(f" {path}:")
        result.append("  " + line.text)
    return result


def _node(node: fx.Node, names: Mapping[str, str]) -> str:
    if node.op == "output":
        return f"return {_literal(node.args[0])}"
    head = f"%{node.name} = {_call(node)} : {type_text(node.meta.get('val'), names)}"
    record = info(node)
    tail = [f"in {fmt}" if (fmt := _grid_of(node)) else ""]
    tail += ["{" + _formats(record) + "}" if record.formats else ""]
    tail += [f"!{_json(record.notes)}" if record.notes else ""]
    tail += [f"<{', '.join(record.passes)}>" if record.passes else ""]
    return " ".join([head, *filter(None, tail)])


def _call(node: fx.Node) -> str:
    if node.op == "placeholder":
        default = f"({_literal(node.args[0])})" if node.args else ""
        renamed = f" {json.dumps(node.target)}" if node.target != node.name else ""
        return f"input{default}{renamed}"
    changed = written(node)
    operands = [_literal(a) + "!" * (a in changed) for a in node.args]
    operands += [f"{k}={_literal(v)}" for k, v in node.kwargs.items()]
    return f"{target_text(node.target)}({', '.join(operands)})"


def target_text(target: object) -> str:
    """``aten.linear`` for ``aten.linear.default``, ``runtime.attend`` for a function of ``mxfx.ops``."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target).removesuffix(".default")
    name = getattr(target, "__name__", "")
    for module, members in MODULES.items():
        if getattr(members, name, None) is target:
            return f"{module}.{name}"
    return f"python.{name or target!r}"


def _grid_of(node: fx.Node) -> str:
    return str(node.args[1]) if target_text(node.target).endswith(".fake_quantize") and len(node.args) > 1 else ""


def _formats(record: NodeInfo) -> str:
    parts, last = [], None
    for operand, annotation in record.formats.items():
        by = "" if annotation.by == last else f" by {json.dumps(annotation.by, ensure_ascii=False)}"
        parts.append(f"{operand}: {annotation.format}{by}")
        last = annotation.by
    return ", ".join(parts)


def _literal(value: object) -> str:
    match value:
        case fx.Node():
            return f"@{value.target}" if value.op == "get_attr" else f"%{value.name}"
        case str():
            return json.dumps(value, ensure_ascii=False)
        case list():
            return f"[{', '.join(map(_literal, value))}]"
        case tuple():
            return f"({', '.join(map(_literal, value))}{',' if len(value) == 1 else ''})"
        case torch.dtype():
            return f"dtype.{_dtype_name(value)}"
        case torch.device() | torch.layout() | torch.memory_format():
            return f"{type(value).__name__}.{str(value).removeprefix('torch.')}"
        case slice():
            return f"slice({_literal(value.start)}, {_literal(value.stop)}, {_literal(value.step)})"
    return repr(value)


def _dtype_name(dtype: torch.dtype) -> str:
    return DTYPES.get(dtype) or str(dtype).removeprefix("torch.")


def _json(value: Mapping[str, object]) -> str:
    return json.dumps(_plain(value), ensure_ascii=False, default=repr)


def _plain(value: object) -> object:
    """Containers as JSON knows them: mapping proxies as objects, tuples as arrays, sets sorted."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else value
