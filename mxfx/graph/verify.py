"""Is a program sound? Checked in levels, each resting on those before it.

1. structure: opcodes, topology, names, readers, one output, inputs as the runtime feeds them
2. metadata: a record and a fake value on every node
3. weights: no dangling read, no orphan, aliases that lead somewhere, ledger and shapes that agree with the tensors
4. schema: arity and kinds of operands, no device or dtype literal, no op that writes its operands but caches, each
written by one node before all that read it
5. types: every op run on fake tensors gives the shape and dtype that its node states
6. formats: annotations on operands that exist, blocks along the contraction axis, quantizers that agree with them
7. lowering: nothing of the dialect left once the program is lowered; and nowhere a node that nobody reads

Levels 4 to 6 look at touched nodes and their readers only where the caller says what was touched.
"""

from __future__ import annotations

import inspect
import operator
from collections import Counter
from collections.abc import Callable, Collection, Iterable

import torch
from torch import Tensor, fx

import mxfx.ops
from mxfx.formats import Format, FormatError
from mxfx.formats import parse as parse_format
from mxfx.graph.fake import FakeRunner, fake_mode_of, sizes_text
from mxfx.graph.mutation import unsound_write
from mxfx.graph.node import META_KEY, NodeInfo, info, op_name, path_of
from mxfx.graph.program import NOMINAL_COMPUTE, NOMINAL_MODEL, Program, compute_dtype
from mxfx.ground.errors import CheckError
from mxfx.ops import find_op
from mxfx.ops.catalogue import Contraction, Spec, spec

_INPUTS = ("input_ids", "position_ids", "attention_mask")
_OPCODES = ("placeholder", "get_attr", "call_function", "output")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_ROLES = ("compute", "model")


class VerifyError(CheckError, ValueError):
    """A program that is not sound; the message names node, module path, what is wrong and what to do."""


def verify(program: Program, touched: Collection[str] | None = None, runner: FakeRunner | None = None) -> int:
    """Check ``program``; only ``touched`` nodes (by name) and their readers are executed again if given.

    A ``runner`` that is kept between calls remembers calls that it has run already: layers and passes repeat them.

    Returns the number of nodes that were executed on fake tensors. Raises ``VerifyError`` at the first fault.
    """
    _structure(program)
    _metadata(program)
    _weights(program)
    nodes = [n for n in program.graph.nodes if touched is None or _is_touched(n, touched)]
    lowered = "lowered" in program.facts
    for node in nodes:
        _schema(node, lowered)
    unsound = unsound_write(program)
    if unsound is not None:
        raise _fault(*unsound, "let one op write a cache, before all that read it (insert-kv-cache)")
    executed = _types(program, nodes, runner)
    for node in nodes:
        _formats(node, lowered)
    if lowered:
        _lowered(program)
    _dead(program)
    return executed


def _is_touched(node: fx.Node, touched: Collection[str]) -> bool:
    return node.name in touched or any(operand.name in touched for operand in node.all_input_nodes)


def _fault(node: fx.Node, problem: str, advice: str) -> VerifyError:
    where = f"{node.name} = {op_name(node)} in {path_of(node) or 'the top level'}"
    return VerifyError(f"{where}: {problem}; {advice}")


def _structure(program: Program) -> None:
    nodes = list(program.graph.nodes)
    for node in nodes:
        if node.op not in _OPCODES:
            raise _fault(node, f"the opcode {node.op!r} is no part of a program", f"use {', '.join(_OPCODES)}")
    _topology(nodes)
    _names(nodes)
    _ends(nodes)
    _inputs(nodes)
    for symbol in program.symbols:
        if not 1 <= symbol.low <= symbol.high:
            raise VerifyError(
                f"symbol {symbol.name!r} has the empty range [{symbol.low}, {symbol.high}]; low ≤ high, from 1"
            )


def _topology(nodes: list[fx.Node]) -> None:
    seen: set[fx.Node] = set()
    known = set(nodes)
    for node in nodes:
        for operand in node.all_input_nodes:
            if operand not in known:
                raise _fault(
                    node, f"it reads {operand.name}, which is not in this graph", "read a node of the same graph"
                )
            if operand not in seen:
                raise _fault(node, f"it reads {operand.name}, which comes later", "move one of the two")
            if node not in operand.users:
                raise _fault(
                    node, f"{operand.name} does not list it as a reader", "change operands through the Rewriter"
                )
        seen.add(node)
    for node in nodes:
        for user in node.users:
            if user not in known or node not in user.all_input_nodes:
                raise _fault(node, f"{user.name} is listed as a reader and does not read it", "use Rewriter.replace")


def _names(nodes: list[fx.Node]) -> None:
    name, count = Counter(n.name for n in nodes).most_common(1)[0]
    if count > 1:
        raise VerifyError(f"{count} nodes are named {name!r}; create nodes through the Rewriter, which numbers names")


def _ends(nodes: list[fx.Node]) -> None:
    outputs = [n for n in nodes if n.op == "output"]
    if len(outputs) != 1 or nodes[-1] is not outputs[0]:
        raise VerifyError(f"the graph has {len(outputs)} outputs; it needs exactly one, as its last node")
    logits = outputs[0].args[0] if outputs[0].args else None
    if not isinstance(logits, fx.Node):
        raise _fault(outputs[0], f"it returns {logits!r}", "return the node of the logits")


def _inputs(nodes: list[fx.Node]) -> None:
    given = [n for n in nodes if n.op == "placeholder"]
    targets = [str(n.target) for n in given]
    if tuple(targets[:3]) != _INPUTS:
        raise VerifyError(f"the inputs are {targets}; the first three must be {list(_INPUTS)}, in this order")
    for node in given[1:]:
        if node.args != (None,):
            raise _fault(node, "this input has no default", "give it the default None: callers may leave it out")


def _dead(program: Program) -> None:
    """Last of all: what else is wrong says more than the dead node that it leaves."""
    for node in program.graph.nodes:
        if node.op in ("call_function", "get_attr") and not node.users:
            raise _fault(node, "nobody reads it", "erase it, or let apply() clean up")


def _metadata(program: Program) -> None:
    mode = fake_mode_of(program.graph)
    for node in program.graph.nodes:
        if node.op == "output":
            continue
        if not isinstance(node.meta.get(META_KEY), NodeInfo):
            raise _fault(node, "it has no provenance record", "create nodes through the Rewriter")
        if "val" not in node.meta:
            raise _fault(
                node, "it has no fake value", "create nodes through the Rewriter, which runs the op on fake tensors"
            )
        for val in _tensors(node.meta["val"]):
            if getattr(val, "fake_mode", None) is not mode:
                raise _fault(
                    node, "its value is a real tensor or of another trace", "make values with Rewriter.run_fake"
                )


def _tensors(val: object) -> Iterable[Tensor]:
    values = val if isinstance(val, list | tuple) else (val,)
    return (v for v in values if isinstance(v, Tensor))


def _weights(program: Program) -> None:
    store = program.weights
    for alias, home in store.aliases.items():
        if home not in set(store):
            raise VerifyError(
                f"alias {alias!r} leads to {home!r}, which is no weight; drop the alias or restore the weight"
            )
        if alias in set(store):
            raise VerifyError(f"{alias!r} is an alias of {home!r} and a weight of its own; use WeightStore.untie")
    read: set[str] = set()
    for node in program.graph.nodes:
        if node.op == "get_attr":
            read.add(_read_weight(program, node))
    # Buffers that the model owns and never reads are in a fresh trace; the first pass drops them.
    own_buffers = store.constants - {change.weight for change in store.ledger}
    orphans = [name for name in store if name not in read and name not in own_buffers]
    if orphans:
        raise VerifyError(
            f"weight {orphans[0]!r} is read by no node ({len(orphans)} such); drop it or let apply() clean up"
        )
    _ties(program)
    _ledger(program)


def _read_weight(program: Program, node: fx.Node) -> str:
    store = program.weights
    if str(node.target) not in store:
        raise _fault(
            node, f"no weight {node.target!r} is in the store", "add it with Rewriter.add_weight, or read another"
        )
    home = store.canonical(str(node.target))
    tensor, val = store[home], node.meta["val"]
    if not isinstance(val, Tensor) or tuple(val.shape) != tuple(tensor.shape):
        stated = tuple(getattr(val, "shape", ()))
        raise _fault(
            node,
            f"it states the shape {stated}, the weight has {tuple(tensor.shape)}",
            "make a new node after reshaping",
        )
    wanted = _weight_dtype(program, home)
    if val.dtype != wanted:
        raise _fault(node, f"it states {val.dtype}, a weight here runs in {wanted}", "create it with Rewriter.weight")
    return home


def _weight_dtype(program: Program, home: str) -> torch.dtype:
    tensor = program.weights[home]
    if not tensor.is_floating_point():
        return tensor.dtype
    constant = home in program.weights.constants
    if "lowered" in program.facts:
        return compute_dtype(program.dtype) if constant else program.dtype
    return NOMINAL_COMPUTE if constant else NOMINAL_MODEL


def _ties(program: Program) -> None:
    """Two weights over one memory are tied, whether the alias table knows it or not."""
    changed = {change.weight for change in program.weights.ledger}
    seen: dict[tuple, str] = {}
    for name, tensor in program.weights.items():
        if tensor.device.type == "meta" or not tensor.numel():
            continue
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        other = seen.setdefault(key, name)
        if other != name and not {name, other} & changed:
            raise VerifyError(
                f"{name!r} and {other!r} share memory and are not tied in the alias table; tie or untie them"
            )


def _ledger(program: Program) -> None:
    last = {change.weight: change.after for change in program.weights.ledger}
    for name, stated in last.items():
        if name in set(program.weights) and stated != "meta" and program.weights.hash(name) != stated:
            raise VerifyError(
                f"weight {name!r} is not what the ledger says; change weights through Rewriter.set_weight only"
            )


def _schema(node: fx.Node, lowered: bool) -> None:
    if node.op != "call_function":
        return
    if isinstance(node.target, torch._ops.OpOverload):
        _overload(node, node.target)
    else:
        _function(node)
    for operand in _flat((*node.args, *node.kwargs.values())):
        if isinstance(operand, torch.device):
            raise _fault(node, f"it names the device {operand}", "make tensors from an operand (new_zeros, ones_like)")
        if isinstance(operand, torch.dtype) and operand in _FLOATS and not lowered:
            raise _fault(node, f"it names the dtype {operand}", "use mxfx.cast with the role 'compute' or 'model'")
        if isinstance(operand, Tensor):
            raise _fault(node, "it holds a tensor as a literal", "put it in the weight store with Rewriter.add_weight")
    if op_name(node) == "mxfx.cast.default" and node.args[1] not in _ROLES:
        raise _fault(node, f"the role {node.args[1]!r} is unknown", f"use {' or '.join(_ROLES)}")


def _overload(node: fx.Node, target: torch._ops.OpOverload) -> None:
    schema = target._schema
    if schema.is_mutable and find_op(target) is None:
        raise _fault(node, "it writes its operands", "use the op without the trailing underscore")
    positional = [a for a in schema.arguments if not a.kwarg_only]
    if len(node.args) > len(positional):
        raise _fault(node, f"it has {len(node.args)} operands, the op takes {len(positional)}", f"see {schema}")
    given = dict(zip((a.name for a in positional), node.args, strict=False))
    twice = sorted(set(given) & set(node.kwargs))
    if twice:
        raise _fault(node, f"the operand {twice[0]!r} is given twice", f"see {schema}")
    if target.namespace == "mxfx" and node.kwargs:
        by_name = sorted(node.kwargs)[0]
        raise _fault(node, f"its operand {by_name!r} is given by name", f"give operands in the order of {schema}")
    given |= node.kwargs
    unknown = sorted(set(given) - {a.name for a in schema.arguments})
    if unknown:
        raise _fault(node, f"the op has no operand {unknown[0]!r}", f"see {schema}")
    for argument in schema.arguments:
        if argument.name not in given:
            if not argument.has_default_value():
                raise _fault(node, f"the operand {argument.name!r} is missing", f"see {schema}")
            continue
        if not _fits(given[argument.name], argument.type):
            raise _fault(
                node, f"{argument.name} is {_said(given[argument.name])}, expected {argument.type}", f"see {schema}"
            )


def _fits(operand: object, wanted: torch._C.JitType) -> bool:
    """Whether an operand can be passed for an argument of a schema's type."""
    if isinstance(wanted, torch._C.OptionalType):
        return operand is None or _fits(operand, wanted.getElementType())
    if isinstance(operand, fx.Node):
        operand = operand.meta.get("val")
    if isinstance(wanted, torch._C.ListType):
        inner = wanted.getElementType()
        return (isinstance(operand, list | tuple) and all(_fits(item, inner) for item in operand)) or _fits_one(
            operand, inner
        )
    match wanted.kind():
        case "TensorType":
            # x * 2.0 is aten.mul.Tensor with a number, which torch wraps.
            return isinstance(operand, Tensor | float) or type(operand) is int
        case "IntType" | "SymIntType":
            # A dtype, layout or memory format is an int in a schema.
            return isinstance(operand, int | torch.SymInt | torch.dtype | torch.layout | torch.memory_format)
        case "FloatType":
            return isinstance(operand, int | float | torch.SymInt | torch.SymFloat)
        case "NumberType":
            return isinstance(operand, int | float | complex | torch.SymInt | torch.SymFloat)
        case "BoolType":
            return isinstance(operand, bool | torch.SymBool)
        case "StringType":
            return isinstance(operand, str)
    return True


def _fits_one(operand: object, inner: torch._C.JitType) -> bool:
    """``dim=1`` may stand for ``dim=[1]``."""
    return isinstance(operand, int) and inner.kind() in ("IntType", "SymIntType")


def _said(operand: object) -> str:
    if isinstance(operand, fx.Node):
        return f"%{operand.name}, a {type(operand.meta.get('val')).__name__}"
    return f"{operand!r}"


def _function(node: fx.Node) -> None:
    target = node.target
    name = getattr(target, "__name__", "")
    known: Callable | None = getattr(mxfx.ops, name, None) or getattr(operator, name, None)
    if known is not target:
        raise _fault(node, f"it calls the Python function {target!r}", "define an op (mxfx.ops.define) and call that")
    try:
        inspect.signature(known).bind(*node.args, **node.kwargs)
    except TypeError as error:
        raise _fault(node, f"its operands do not fit: {error}", f"see {name}{inspect.signature(known)}") from error


def _flat(operands: Iterable[object]) -> Iterable[object]:
    for operand in operands:
        if isinstance(operand, list | tuple):
            yield from _flat(operand)
        else:
            yield operand


def _types(program: Program, nodes: list[fx.Node], kept: FakeRunner | None) -> int:
    mode = fake_mode_of(program.graph)
    if mode is None:
        raise VerifyError("the graph carries no fake tensors; make programs with mxfx.trace or the IR parser")
    # Symbols of another trace may have the same names: what was run for them says nothing here.
    runner = kept if kept is not None and kept.mode is mode else FakeRunner(mode)
    executed = 0
    for node in nodes:
        if node.op == "placeholder":
            _input_type(node)
        if node.op == "output":
            _logits_type(node)
        if node.op != "call_function":
            continue
        executed += 1
        try:
            actual = runner.run(node)
        except Exception as error:
            raise _fault(
                node, f"the op refuses its operands: {_first_line(error)}", "check shapes and dtypes"
            ) from error
        if not _same(actual, node.meta["val"]):
            stated, found = _described(node.meta["val"]), _described(actual)
            raise _fault(
                node, f"it states {stated}, the op gives {found}", "create it with Rewriter.call, or fix its operands"
            )
    return executed


def _input_type(node: fx.Node) -> None:
    val = node.meta["val"]
    if node.target in _INPUTS and not (isinstance(val, Tensor) and val.dim() == 2 and val.dtype == torch.int64):
        raise _fault(node, f"it is {_described(val)}", "token inputs are int64 (batch, seq)")


def _logits_type(node: fx.Node) -> None:
    val = node.args[0].meta["val"]
    if not (isinstance(val, Tensor) and val.dim() == 3 and val.is_floating_point()):
        raise _fault(node, f"it returns {_described(val)}", "return floating logits (batch, seq, vocabulary)")


def _same(actual: object, stated: object) -> bool:
    if isinstance(actual, Tensor) and isinstance(stated, Tensor):
        return actual.dtype == stated.dtype and sizes_text(actual) == sizes_text(stated)
    if isinstance(actual, list | tuple) and isinstance(stated, list | tuple):
        return len(actual) == len(stated) and all(map(_same, actual, stated))
    return not isinstance(actual, Tensor) and not isinstance(stated, Tensor) and str(actual) == str(stated)


def _described(val: object) -> str:
    if isinstance(val, list | tuple):
        return f"({', '.join(map(_described, val))})"
    if not isinstance(val, Tensor):
        return f"{type(val).__name__} {val}"
    return f"{str(val.dtype).removeprefix('torch.')}[{', '.join(map(str, val.shape))}]"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _formats(node: fx.Node, lowered: bool) -> None:
    call = spec(node)
    if call.rounds is not None:
        _quantizer(node, call)
    for contraction in call.contracts:
        _contraction(node, call, contraction)
    for operand, annotation in info(node).formats.items():
        if not isinstance(annotation.format, Format):
            raise _fault(
                node, f"{operand} carries {annotation.format!r}, which is no format", "annotate with a parsed Format"
            )
        if not lowered:
            _annotated(node, operand, annotation.format)


def _quantizer(node: fx.Node, call: Spec) -> None:
    rounded = call.rounds
    assert rounded is not None
    axis = rounded.axis
    try:
        fmt = parse_format(rounded.format)
    except FormatError as error:
        raise _fault(node, str(error), "give a format such as mxint4@32") from error
    val = node.meta["val"]
    if not isinstance(axis, int) or not -val.dim() <= axis < val.dim():
        raise _fault(
            node, f"axis {axis} does not exist in {_described(val)}", f"use one from {-val.dim()} to {val.dim() - 1}"
        )
    if not val.is_floating_point():
        raise _fault(node, f"it rounds {_described(val)}", "quantize floating values only")
    # The last axis is what a reader sums over; of probabilities it is the keys, where the future is zero.
    inner = axis in (-1, val.dim() - 1) and val.dim() == 4
    if fmt.block is not None and not isinstance(val.shape[axis], int) and not inner:
        raise _fault(
            node,
            f"blocks of {fmt.block} run along axis {axis} of {_described(val)}, whose length is not fixed",
            "let blocks run along a fixed axis: a token's codes may not depend on its neighbours",
        )


def _contraction(node: fx.Node, call: Spec, contraction: Contraction) -> None:
    """Blocks along any other axis than the one summed over cannot be multiplied in the format."""
    for name, axis in zip((contraction.left, contraction.right), contraction.axes, strict=True):
        source = call.node_of(name)
        rounded = spec(source).rounds if source is not None else None
        if rounded is None or rounded.axis in (axis, call.axis(name)):
            continue
        raise _fault(
            node,
            f"its {name} has blocks along axis {rounded.axis}; it sums over axis {axis} ({contraction.over})",
            f"quantize along axis {axis}",
        )


def _annotated(node: fx.Node, operand: str, fmt: Format) -> None:
    call = spec(node)
    if operand == "output":
        # Any value may carry the format that it is to be rounded to: a rotated input, scores of spelled-out attention.
        val = node.meta["val"]
        if not (isinstance(val, Tensor) and val.is_floating_point()):
            raise _fault(node, f"output carries {fmt} and is {_described(val)}", "annotate floating values only")
        return
    if not call.carries:
        raise _fault(
            node,
            f"{operand} carries {fmt}, but no operand of this op can carry a format",
            "annotate linears, attention, …",
        )
    if not call.has(operand) or call.axis(operand) is None:
        raise _fault(node, f"a {call.concept} has no operand {operand!r}", f"annotate {', '.join(call.carries)}")
    if call.operand(operand).argument is None:
        return
    source, axis = call.node_of(operand), call.axis(operand)
    if source is None:
        raise _fault(node, f"{operand} carries {fmt}, but the node has no such operand", "annotate operands that exist")
    if fmt.block is not None and not isinstance(source.meta["val"].shape[axis], int):
        raise _fault(node, f"{operand} has no fixed axis {axis} for blocks of {fmt.block}", "annotate another operand")
    rounded = spec(source).rounds
    if rounded is not None and rounded.format != str(fmt):
        raise _fault(
            node, f"{operand} is annotated {fmt} and quantized to {rounded.format}", "let one pass decide the format"
        )


def _lowered(program: Program) -> None:
    for node in program.graph.nodes:
        if node.op == "call_function" and find_op(node.target) is not None:
            raise _fault(
                node, "the program counts as lowered and this op is not", "run 'lower' after the pass that made it"
            )
        roles = {NOMINAL_MODEL, NOMINAL_COMPUTE} - {program.dtype, compute_dtype(program.dtype)}
        for val in _tensors(node.meta.get("val")):
            if val.dtype in roles:
                raise _fault(
                    node, f"its value still has the nominal dtype {val.dtype}", "lower gives every value its real dtype"
                )
