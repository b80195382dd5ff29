"""The printed form of a program, and back.

    mxfx-ir 1
    source "llama-tiny" LlamaForCausalLM
    config {"hidden_size": 64, …}
    dtype f32
    symbols batch in [1, 4096], seq in [1, 256]
    facts norms-raised
    weights
      @model.norm.weight : f32[64] #0123456789abcdef
      @lm_head.weight = @model.embed_tokens.weight
      @model.rotary_emb.inv_freq : f32[8] #fedcba9876543210 constant
    graph
      %input_ids = input : i64[batch, seq]
     model.layers.0.mlp.up_proj:
      %linear_5 = aten.linear(%x, @w) : bf16[batch, seq, 96] {input: mxint4@32 by "annotate rule 1"} <annotate>
      return %linear_14

One line a node: name, op, operands, the type of its result, then, where there are any, annotations in braces, notes as
JSON behind ``!``, and in angle brackets the passes that made or changed it. A value that is on a format's grid says so
behind its type (``in mxint4@32``). An operand that the node writes, a cache, is marked ``!``. A line ending in a colon
opens the nodes of a module path. Types are nominal (bf16 for the model's dtype, f32 for compute precision) until the
program is lowered. Weights are named by hash:
blake2b over dtype, shape and bytes.
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

import mxfx.ops
from mxfx.formats import FormatError
from mxfx.formats import parse as parse_format
from mxfx.graph.fake import FakeRunner, size_text
from mxfx.graph.mutation import written
from mxfx.graph.node import Annotation, NodeInfo, info, path_of, set_info
from mxfx.graph.program import NOMINAL_COMPUTE, NOMINAL_MODEL, Program, Source, Symbol, compute_dtype
from mxfx.graph.weights import WeightStore, tensor_hash
from mxfx.ground.errors import MxfxError

VERSION = 1

_DTYPES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "b1",
}
_BY_NAME = {name: dtype for dtype, name in _DTYPES.items()}
_MODULES = {"operator": operator, "runtime": mxfx.ops}
_OUTSIDE = ""


class TextError(MxfxError, ValueError):
    """A text that is no printed program, or one that does not fit the weights; the message starts with its line."""


class HashMismatch(TextError):
    """A weight of the store is not the one that the text names."""


def to_text(program: Program, *, header: bool = True) -> str:
    """The program as text that ``parse`` reads back; without ``header`` the graph alone.

    Values in notes that JSON cannot say are written by their ``repr`` and come back as strings.
    """
    return str(Printout.of(program)) if header else "\n".join(["graph", *_sections(graph_lines(program))]) + "\n"


@dataclass(frozen=True)
class Printout:
    """A program's lines, printed once for all who read them: text, differences."""

    header: list[str]
    graph: list[Line]

    @classmethod
    def of(cls, program: Program) -> Printout:
        return cls(header_lines(program), graph_lines(program))

    def __str__(self) -> str:
        return "\n".join([*self.header, "graph", *_sections(self.graph)]) + "\n"


@dataclass(frozen=True)
class Line:
    """One node, printed: ``text`` stands in the section ``path``; ``name`` is the node's."""

    name: str
    path: str
    text: str


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


def graph_lines(program: Program) -> list[Line]:
    """Every node but ``get_attr``, which is printed where it is read, as ``@name``."""
    names = symbol_names(program)
    return [Line(n.name, path_of(n), _node(n, names)) for n in program.graph.nodes if n.op != "get_attr"]


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
    path = _OUTSIDE
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
    for module, members in _MODULES.items():
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
    return _DTYPES.get(dtype) or str(dtype).removeprefix("torch.")


def _json(value: Mapping[str, object]) -> str:
    return json.dumps(_plain(value), ensure_ascii=False, default=repr)


def _plain(value: object) -> object:
    """Containers as JSON knows them: mapping proxies as objects, tuples as arrays, sets sorted."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else value


def parse(text: str, store: Mapping[str, Tensor] | None = None) -> Program:
    """The program that was printed as ``text``.

    Weights are looked up in ``store`` by name and checked by hash; without a store they are meta tensors that keep the
    hash they were printed with. Symbols get their ranges back, and every op runs on fake tensors, so that the types in
    the text are checked.

    Raises ``TextError`` with the line for anything that is not as ``to_text`` writes it, and ``HashMismatch`` for a
    weight of the store that is not the one named.
    """
    reader = _Reader(text.splitlines(), store)
    return reader.program()


_HEADER = ("source", "config", "dtype", "symbols", "facts", "notes")
_WEIGHT = re.compile(r"  @(\S+) : (\w+)\[([\d, ]*)\] #(\w+)( constant)?")
_ALIAS = re.compile(r"  @(\S+) = @(\S+)")
_SYMBOL = re.compile(r"(\w+) in \[(\d+), (\d+)\]")
_SECTION = re.compile(r" (\S.*|):")
_NODE = re.compile(r"%(\w+) = ")
_WORD = re.compile(r"[\w.+-]+")
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?([eE][+-]?\d+)?|inf|nan)(?![\w.])")
_JSON = json.JSONDecoder()


class _Reader:
    def __init__(self, lines: list[str], store: Mapping[str, Tensor] | None) -> None:
        self.lines = lines
        self.store = store
        self.number = 0
        self.line = ""
        self.at = 0
        self.env: dict[str, fx.Node] = {}
        self.weight_nodes: dict[str, fx.Node] = {}

    def program(self) -> Program:
        if not self.advance() or self.line != f"mxfx-ir {VERSION}":
            raise self.error(f"expected 'mxfx-ir {VERSION}': is this a printed program?")
        header = self.header()
        weights = self.weights()
        self.symbols = tuple(Symbol(n, int(a), int(b)) for n, a, b in _SYMBOL.findall(header.get("symbols", "")))
        name, _, architecture = self.source(header)
        facts = frozenset(filter(None, header.get("facts", "").split(", ")))
        self.dtype = _BY_NAME.get(header.get("dtype", ""), torch.float32)
        self.lowered = "lowered" in facts
        self.result = Program(
            fx.Graph(),
            weights,
            self.dtype,
            Source(name, architecture, json.loads(header.get("config", "{}"))),
            self.symbols,
            facts,
            _tuples(json.loads(header.get("notes", "{}"))),
        )
        self.mode, self.sizes = _environment(self.symbols)
        self.fake = FakeRunner(self.mode)
        self.graph()
        return self.result

    def source(self, header: Mapping[str, str]) -> tuple[str, str, str]:
        if "source" not in header:
            raise self.error("the header has no 'source' line")
        name, end = _JSON.raw_decode(header["source"])
        return name, "", header["source"][end:].strip()

    def header(self) -> dict[str, str]:
        header: dict[str, str] = {}
        while self.advance() and self.line != "weights":
            key, _, rest = self.line.partition(" ")
            if key not in _HEADER or key in header:
                raise self.error(
                    f"unexpected header line {key!r}; expected one of {', '.join(_HEADER)}, then 'weights'"
                )
            header[key] = rest
        return header

    def weights(self) -> WeightStore:
        tensors: dict[str, Tensor] = {}
        aliases: dict[str, str] = {}
        hashes: dict[str, str] = {}
        constants: set[str] = set()
        while self.advance() and self.line != "graph":
            if found := _ALIAS.fullmatch(self.line):
                aliases[found[1]] = found[2]
            elif found := _WEIGHT.fullmatch(self.line):
                name, hashed = found[1], found[4]
                shape = [int(s) for s in found[3].split(", ") if s]
                tensors[name] = self.tensor(name, shape, self.dtype_of(found[2]), hashed)
                hashes[name] = hashed
                constants |= {name} if found[5] else set()
            else:
                raise self.error("expected a weight, '  @name : f32[2, 3] #hash', an alias, or 'graph'")
        store = WeightStore(tensors, aliases, constants=frozenset(constants))
        for name, hashed in hashes.items():
            # A meta tensor has no bytes to hash; it stands for the tensor that the text names.
            store.trust_hash(name, hashed)
        return store

    def tensor(self, name: str, shape: list[int], dtype: torch.dtype, hashed: str) -> Tensor:
        if self.store is None or hashed == "meta":
            return torch.empty(shape, dtype=dtype, device="meta")
        if name not in self.store:
            raise self.error(f"the store has no weight {name!r}; give the one that the text was printed with, or none")
        tensor = self.store[name]
        actual = self.store.hash(name) if isinstance(self.store, WeightStore) else tensor_hash(tensor)
        if actual != hashed:
            raise HashMismatch(
                f"line {self.number}: weight {name!r} is #{hashed} in the text and #{actual} in the store"
            )
        return tensor

    def graph(self) -> None:
        path = _OUTSIDE
        while self.advance():
            if section := _SECTION.fullmatch(self.line):
                path = section[1]
                continue
            self.at = 2
            if self.line.startswith("  return "):
                self.at = len("  return ")
                self.result.graph.output(self.value())
                self.finish()
                continue
            self.node(path)
        if not self.result.graph.nodes or next(iter(reversed(self.result.graph.nodes))).op != "output":
            raise self.error("the graph ends without 'return'")

    def node(self, path: str) -> None:
        found = _NODE.match(self.line, 2)
        if not self.line.startswith("  %") or found is None:
            raise self.error("expected '  %name = op(…) : type', a module path and a colon, or 'return %name'")
        name = found[1]
        if name in self.env:
            raise self.error(f"%{name} is defined twice")
        self.at = found.end()
        node = self.input(name) if self.word_is("input") else self.call(name)
        if node.name != name:
            raise self.error(f"%{name} is no name that a graph can keep (it became %{node.name})")
        self.env[name] = node
        self.expect(" : ")
        stated = self.until_type_end()
        record = NodeInfo(path=path)
        if self.take(" in "):
            self.pattern(re.compile(r"\S+"))
        if self.take(" {"):
            record = self.formats(record)
        if self.take(" !"):
            for key, value in self.json().items():
                record = record.with_note(key, _tuples(value))
        if self.take(" <"):
            passes = self.pattern(re.compile(r"[^>]*"))
            self.expect(">")
            record = NodeInfo(record.path, tuple(passes.split(", ")), record.formats, record.notes)
        self.finish()
        set_info(node, record)
        node.meta["val"] = self.fake_input(stated) if node.op == "placeholder" else self.run(node)
        actual = type_text(node.meta["val"], self.names())
        if actual != stated:
            raise self.error(f"%{name} is said to be {stated}, but {target_text(node.target)} gives {actual}")

    def input(self, name: str) -> fx.Node:
        self.pattern(_WORD)
        default: tuple = ()
        if self.take("("):
            default = (self.value(),)
            self.expect(")")
        target = name
        if self.line.startswith(' "', self.at):
            self.at += 1
            target = self.string()
        return self.result.graph.create_node("placeholder", target, default, name=name)

    def call(self, name: str) -> fx.Node:
        target = self.target()
        args: list = []
        kwargs: dict = {}
        self.expect("(")
        while not self.take(")"):
            key = re.compile(r"(\w+)=").match(self.line, self.at)
            if key:
                self.at = key.end()
                kwargs[key[1]] = self.value()
            else:
                args.append(self.value())
            self.take(", ")
        return self.result.graph.create_node("call_function", target, tuple(args), kwargs, name=name)

    def target(self) -> Callable:
        text = self.pattern(_WORD)
        module, _, rest = text.partition(".")
        if module in _MODULES:
            found = getattr(_MODULES[module], rest, None)
        else:
            name, _, overload = rest.partition(".")
            packet = getattr(getattr(torch.ops, module, None), name, None)
            found = getattr(packet, overload or "default", None)
        if not callable(found):
            raise self.error(f"unknown op {text!r}; a program is made of torch ops, mxfx.… and {', '.join(_MODULES)}.…")
        return found

    def formats(self, record: NodeInfo) -> NodeInfo:
        by = ""
        while not self.take("}"):
            operand = self.pattern(re.compile(r"\w+"))
            self.expect(": ")
            text = self.pattern(re.compile(r"[^\s,}]+"))
            if self.take(" by "):
                by = self.string()
            try:
                record = record.with_format(operand, Annotation(parse_format(text), by))
            except FormatError as error:
                raise self.error(str(error)) from error
            self.take(", ")
        return record

    def value(self) -> object:
        rest = self.line[self.at : self.at + 1]
        if rest == "%":
            name = self.pattern(re.compile(r"%\w+"))[1:]
            if name not in self.env:
                raise self.error(f"%{name} is read before it is defined")
            self.take("!")
            return self.env[name]
        if rest == "@":
            return self.weight(self.pattern(re.compile(r"@[^\s,()\[\]]+"))[1:])
        if rest == '"':
            return self.string()
        if rest and rest in "[(":
            return self.items(rest)
        if _NUMBER.match(self.line, self.at):
            text = self.pattern(_NUMBER)
            return float(text) if re.search(r"[.einf]", text) else int(text)
        return self.word()

    def items(self, opening: str) -> object:
        self.at += 1
        closing = "]" if opening == "[" else ")"
        items = []
        while not self.take(closing):
            items.append(self.value())
            self.take(",")
            self.take(" ")
        return items if opening == "[" else tuple(items)

    def word(self) -> object:
        text = self.pattern(_WORD)
        constant = {"None": None, "True": True, "False": False}
        if text in constant:
            return constant[text]
        if text == "slice":
            return slice(*self.items("("))  # type: ignore[misc]
        kind, _, name = text.partition(".")
        if kind == "dtype":
            return self.dtype_of(name)
        if kind == "device":
            return torch.device(name + self.pattern(re.compile(r"(:\d+)?")))
        if kind in ("layout", "memory_format") and isinstance(
            getattr(torch, name, None), torch.layout | torch.memory_format
        ):
            return getattr(torch, name)
        raise self.error(f"unknown operand {text!r}")

    def weight(self, name: str) -> fx.Node:
        if name in self.weight_nodes:
            return self.weight_nodes[name]
        weights = self.result.weights
        if name not in weights:
            raise self.error(f"@{name} is not among the weights")
        tensor = weights[name]
        compute, model = (compute_dtype(self.dtype), self.dtype) if self.lowered else (NOMINAL_COMPUTE, NOMINAL_MODEL)
        constant = weights.canonical(name) in weights.constants
        dtype = tensor.dtype if not tensor.is_floating_point() else compute if constant else model
        node = self.result.graph.create_node("get_attr", name)
        with self.mode:
            node.meta["val"] = torch.empty(tensor.shape, dtype=dtype, device="meta")
        set_info(node, NodeInfo())
        self.weight_nodes[name] = node
        return node

    def fake_input(self, stated: str) -> object:
        found = re.fullmatch(r"(\w+)\[(.*)\]", stated)
        if found is None:
            raise self.error(f"an input is a tensor such as i64[batch, seq], not {stated}")
        shape = [self.size(d) for d in found[2].split(", ") if d]
        with self.mode:
            return torch.empty(shape, dtype=self.dtype_of(found[1]), device="meta")

    def size(self, text: str) -> object:
        if text.isdecimal():
            return int(text)
        if text not in self.sizes:
            raise self.error(f"the size {text!r} is not among the header's symbols")
        return self.sizes[text]

    def run(self, node: fx.Node) -> object:
        try:
            return self.fake.run(node)
        except Exception as error:
            raise self.error(f"{target_text(node.target)} refuses these operands: {error}") from error

    def names(self) -> dict[str, str]:
        return {str(size): name for name, size in self.sizes.items()}

    def advance(self) -> bool:
        """Go to the next line that is neither empty nor a comment (``// …``)."""
        while self.number < len(self.lines):
            self.line = self.lines[self.number].rstrip()
            self.number += 1
            self.at = 0
            if self.line and not self.line.startswith("//"):
                return True
        self.line = ""
        return False

    def until_type_end(self) -> str:
        found = re.compile(r"\w+\[[^\]]*\]|sym\((?:[^()]|\([^()]*\))*\)|\(.*?\)(?= |$)|\?").match(self.line, self.at)
        if found is None:
            raise self.error("expected a type such as bf16[batch, seq, 64]")
        self.at = found.end()
        return found[0]

    def word_is(self, word: str) -> bool:
        return re.compile(rf"{word}(?![\w.])").match(self.line, self.at) is not None

    def json(self) -> dict:
        try:
            value, self.at = _JSON.raw_decode(self.line, self.at)
        except ValueError as error:
            raise self.error(f"expected JSON: {error}") from error
        return value

    def string(self) -> str:
        value = self.json()
        if not isinstance(value, str):
            raise self.error("expected a string")
        return value

    def pattern(self, pattern: re.Pattern[str]) -> str:
        found = pattern.match(self.line, self.at)
        if found is None:
            raise self.error(f"unexpected {self.line[self.at : self.at + 20]!r}")
        self.at = found.end()
        return found[0]

    def take(self, text: str) -> bool:
        if not self.line.startswith(text, self.at):
            return False
        self.at += len(text)
        return True

    def expect(self, text: str) -> None:
        if not self.take(text):
            raise self.error(f"expected {text!r}, found {self.line[self.at : self.at + 20]!r}")

    def finish(self) -> None:
        if self.at != len(self.line):
            raise self.error(f"unexpected {self.line[self.at : self.at + 20]!r} behind the node")

    def dtype_of(self, name: str) -> torch.dtype:
        dtype = _BY_NAME.get(name) or getattr(torch, name, None)
        if not isinstance(dtype, torch.dtype):
            raise self.error(f"unknown dtype {name!r}")
        return dtype

    def error(self, problem: str) -> TextError:
        return TextError(f"line {self.number}: {problem}\n  {self.line}")


def _environment(symbols: tuple[Symbol, ...]) -> tuple[FakeTensorMode, dict[str, torch.SymInt]]:
    """A fresh shape environment with one backed symbol for each named one, in its range."""
    from torch._dynamo.source import ConstantSource

    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env, allow_non_fake_inputs=True)
    sizes: dict[str, torch.SymInt] = {}
    for position, symbol in enumerate(symbols):
        # Hints must differ, or equal sizes would be taken for one; a prime divides nothing by accident.
        hint = min(symbol.high, (2, 17, 31, 43, 59)[position % 5])
        where = ConstantSource(symbol.name)
        expression = env.create_symbol(hint, where, dynamic_dim=DimDynamic.DYNAMIC)
        env.constrain_symbol_range(expression, symbol.low, symbol.high)
        sizes[symbol.name] = env.create_symintnode(expression, hint=hint, source=where)
    return mode, sizes


def _tuples(value: object) -> object:
    """JSON arrays as tuples, all the way down: records are immutable."""
    if isinstance(value, list):
        return tuple(_tuples(v) for v in value)
    return {k: _tuples(v) for k, v in value.items()} if isinstance(value, dict) else value


__all__ = ["HashMismatch", "Line", "TextError", "graph_lines", "parse", "to_text", "type_text"]
