"""A program from its text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from mxfx.formats import FormatError
from mxfx.formats import parse as parse_format
from mxfx.graph.fake import runner_of
from mxfx.graph.node import Annotation, NodeInfo, set_info
from mxfx.graph.program import NOMINAL_COMPUTE, NOMINAL_MODEL, Program, Source, Symbol, compute_dtype
from mxfx.graph.text.characters import Lines
from mxfx.graph.text.printing import target_text, type_text
from mxfx.graph.text.words import BY_NAME, MODULES, OUTSIDE, VERSION, HashMismatch
from mxfx.graph.weights import WeightStore, tensor_hash
from mxfx.ground.errors import MxfxError, reason_of


def parse(text: str, store: Mapping[str, Tensor] | None = None) -> Program:
    """The program that was printed as ``text``.

    Weights are looked up in ``store`` by name and checked by hash; without a store they are meta tensors that keep the
    hash they were printed with. Symbols get their ranges back, and every op runs on fake tensors, so that the types in
    the text are checked.

    Raises ``TextError`` with the line for anything that is not as ``to_text`` writes it, and ``HashMismatch`` for a
    weight of the store that is not the one named.
    """
    return read_by(Reader(text.splitlines(), store))


def read_by(reader: Reader) -> Program:
    """What a reader finds; of any error in it, ``TextError`` with the line."""
    try:
        return reader.program()
    except MxfxError:
        raise
    except Exception as error:
        # Every op runs on fake tensors: a wrong operand can surface as any kind of error.
        raise reader.error(f"is no printed program ({type(error).__name__}: {reason_of(error)})") from error


_HEADER = ("source", "config", "dtype", "symbols", "facts", "notes")
_WEIGHT = re.compile(r"  @(\S+) : (\w+)\[([\d, ]*)\] #(\w+)( constant)?")
_ALIAS = re.compile(r"  @(\S+) = @(\S+)")
_SYMBOL = re.compile(r"(\w+) in \[(\d+), (\d+)\]")
_SECTION = re.compile(r" (\S.*|):")
_NODE = re.compile(r"%(\w+) = ")
_WORD = re.compile(r"[\w.+-]+")
_INPUT = re.compile(r"input(?![\w.])")
_KEY = re.compile(r"(\w+)=")
_NODE_READ = re.compile(r"%\w+")
_WEIGHT_READ = re.compile(r"@[^\s,()\[\]]+")
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?([eE][+-]?\d+)?|inf|nan)(?![\w.])")
_JSON = json.JSONDecoder()


class Reader(Lines):
    """Reads a whole printed program."""

    def __init__(self, lines: list[str], store: Mapping[str, Tensor] | None) -> None:
        super().__init__(lines)
        self.store = store
        self.env: dict[str, fx.Node] = {}
        self.weight_nodes: dict[str, fx.Node] = {}
        self.targets: dict[str, Callable] = {}

    def program(self) -> Program:
        if not self.advance() or self.line != f"mxfx-ir {VERSION}":
            raise self.error(f"expected 'mxfx-ir {VERSION}': is this a printed program?")
        header = self.header()
        return self.build(header, self.weights())

    def build(self, header: Mapping[str, str], weights: WeightStore) -> Program:
        """The program of a header, weights, and the graph lines that follow."""
        self.symbols = tuple(Symbol(n, int(a), int(b)) for n, a, b in _SYMBOL.findall(header.get("symbols", "")))
        name, _, architecture = self.source(header)
        facts = frozenset(filter(None, header.get("facts", "").split(", ")))
        self.dtype = BY_NAME.get(header.get("dtype", ""), torch.float32)
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
        self.prepare()
        self.graph()
        return self.result

    def prepare(self) -> None:
        """What ops run in, before the first."""
        self.mode, self.sizes = _environment(self.symbols)
        self.fake = runner_of(self.mode)

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
        path = OUTSIDE
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
        node = self.input(name) if _INPUT.match(self.line, self.at) else self.call(name)
        if node.name != name:
            raise self.error(f"%{name} is no name that a graph can keep (it became %{node.name})")
        self.env[name] = node
        self.expect(" : ")
        self.rest(node, path)

    def rest(self, node: fx.Node, path: str) -> None:
        """The type of a node and its record; what the op gives must be of the type."""
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
            raise self.error(f"%{node.name} is said to be {stated}, but {target_text(node.target)} gives {actual}")

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
            key = _KEY.match(self.line, self.at)
            if key:
                self.at = key.end()
                kwargs[key[1]] = self.value()
            else:
                args.append(self.value())
            self.take(", ")
        return self.result.graph.create_node("call_function", target, tuple(args), kwargs, name=name)

    def target(self) -> Callable:
        text = self.pattern(_WORD)
        if text in self.targets:
            return self.targets[text]
        module, _, rest = text.partition(".")
        if module in MODULES:
            found = getattr(MODULES[module], rest, None)
        else:
            name, _, overload = rest.partition(".")
            packet = getattr(getattr(torch.ops, module, None), name, None)
            found = getattr(packet, overload or "default", None)
        if not callable(found):
            raise self.error(f"unknown op {text!r}; a program is made of torch ops, mxfx.… and {', '.join(MODULES)}.…")
        self.targets[text] = found
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
            name = self.pattern(_NODE_READ)[1:]
            if name not in self.env:
                raise self.error(f"%{name} is read before it is defined")
            self.take("!")
            return self.env[name]
        if rest == "@":
            return self.weight(self.pattern(_WEIGHT_READ)[1:])
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
        node = self.weight_nodes[name] = self.result.graph.create_node("get_attr", name)
        self.describe(node)
        return node

    def describe(self, node: fx.Node) -> None:
        """Say what a weight is: its shape, and the dtype that it runs in."""
        name, weights = str(node.target), self.result.weights
        tensor = weights[name]
        compute, model = (compute_dtype(self.dtype), self.dtype) if self.lowered else (NOMINAL_COMPUTE, NOMINAL_MODEL)
        constant = weights.canonical(name) in weights.constants
        dtype = tensor.dtype if not tensor.is_floating_point() else compute if constant else model
        with self.mode:
            node.meta["val"] = torch.empty(tensor.shape, dtype=dtype, device="meta")
        set_info(node, NodeInfo())

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
