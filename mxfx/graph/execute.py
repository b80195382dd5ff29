"""Run a program node by node, lowered or not: the reference that promises about numbers are held to."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, fx

from mxfx.graph.node import op_name
from mxfx.graph.program import Program, compute_dtype
from mxfx.graph.weights import version
from mxfx.ops.fused import FUSED

_cast = torch.ops.mxfx.cast.default
_QUANTIZERS = (torch.ops.mxfx.fake_quantize.default, torch.ops.mxfx.keep_first_quantize.default)

#: Sees every computed value and returns the value that later nodes read.
Observer = Callable[[fx.Node, object], object]


class CastCache:
    """Weights in the dtype that they run in, kept between executions of programs that share tensors.

    Holds at most ``limit`` bytes; what does not fit is cast again each time.
    """

    def __init__(self, limit: int = 1 << 29) -> None:
        self.limit = limit
        self._known: dict[int, tuple[Tensor, int, Tensor]] = {}
        self._bytes = 0

    def __call__(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """``tensor.to(dtype)``."""
        if tensor.dtype == dtype:
            return tensor
        known = self._known.get(id(tensor))
        if known is not None and known[0] is tensor and known[1] == version(tensor) and known[2].dtype == dtype:
            return known[2]
        cast = tensor.to(dtype)
        if self._bytes + cast.nbytes <= self.limit:
            self._bytes += cast.nbytes
            self._known[id(tensor)] = (tensor, version(tensor), cast)
        return cast

    def keep_only(self, tensors: Collection[Tensor]) -> None:
        """Forget the casts of all other tensors."""
        wanted = {id(tensor) for tensor in tensors}
        self._known = {key: found for key, found in self._known.items() if key in wanted}
        self._bytes = sum(cast.nbytes for *_, cast in self._known.values())


def execute(
    program: Program,
    input_ids: Tensor,
    position_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    observe: Observer | None = None,
    quantize: bool = True,
    casts: CastCache | None = None,
    feed: Callable[[fx.Node], Tensor] | None = None,
    others: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Logits ``(batch, seq, vocabulary)`` of a program in its own dtype, from the definitions of its ops.

    ``input_ids``, ``position_ids`` and ``attention_mask`` are int64 ``(batch, seq)``; ``others`` are further inputs of
    the graph. ``quantize=False`` reads every ``fake_quantize`` as the identity: the real function behind a program with
    quantizers. ``casts`` is kept by a caller that executes several programs with the same weights. A weight is brought
    to its dtype when the first node reads it, and goes with the last; ``feed`` (``mxfx.graph.feed``) brings those of a
    model that the device does not hold.

    Raises ``ValueError`` if a weight is on the meta device (there are no numbers to compute with), and, to be without
    quantizers, if one is part of a fused op.
    """
    if not quantize:
        _check_unfused(program)
    given = {"input_ids": input_ids, "position_ids": position_ids, "attention_mask": attention_mask, **(others or {})}
    last_reader = last_readers(program.graph)
    env: dict[fx.Node, object] = {}
    with torch.no_grad():
        for node in program.graph.nodes:
            if node.op == "output":
                return env[node.args[0]]
            if node.op == "get_attr":
                continue
            for operand in node.all_input_nodes:
                if operand not in env:
                    name = str(operand.target)
                    env[operand] = runtime_weight(program, name, casts) if feed is None else feed(operand)
            value = call(program, node, env, given, quantize, casts)
            env[node] = value if observe is None else observe(node, value)
            for operand in last_reader.get(node, ()):
                del env[operand]
    raise ValueError("the graph has no output")


def executable(program: Program) -> str | None:
    """Why ``execute`` cannot run a program; None if it can."""
    meta = [name for name, tensor in program.weights.items() if tensor.device.type == "meta"]
    if meta:
        return f"{len(meta)} of {len(program.weights)} weights have no data (meta device)"
    strangers = [
        n.name for n in program.graph.nodes if n.op == "placeholder" and n.target != "input_ids" and not n.args
    ]
    return f"the graph needs inputs beside input_ids: {', '.join(strangers)}" if strangers else None


def runtime_weight(program: Program, name: str, casts: CastCache | None = None) -> Tensor:
    """A weight in the dtype that it runs in: the model's, or compute precision for constants such as ``inv_freq``."""
    return as_run(program, name, checked_weight(program, name), casts)


def checked_weight(program: Program, name: str) -> Tensor:
    """A weight as it is stored. Raises ``ValueError`` if there are no numbers in it."""
    tensor = program.weights[name]
    if tensor.device.type == "meta":
        raise ValueError(f"weight {name!r} has no data (meta device): the program can be printed, not run")
    return tensor


def as_run(program: Program, name: str, tensor: Tensor, casts: CastCache | None = None) -> Tensor:
    """The tensor of a weight, on whatever device, in the dtype that it runs in."""
    if not tensor.is_floating_point():
        return tensor
    constant = program.weights.canonical(name) in program.weights.constants
    dtype = compute_dtype(program.dtype) if constant else program.dtype
    return tensor.to(dtype) if casts is None else casts(tensor, dtype)


def value_of(program: Program, node: fx.Node) -> Tensor:
    """What a node that depends on weights alone computes, in the precision that the program runs in.

    Raises ``ValueError`` where an input of the program decides it.
    """
    env: dict[fx.Node, object] = {}

    def compute(one: fx.Node) -> object:
        if one.op == "placeholder":
            raise ValueError(f"{node.name} depends on the input {one.target}")
        if one not in env:
            for operand in one.all_input_nodes:
                compute(operand)
            env[one] = call(program, one, env, {}, True, None)
        return env[one]

    with torch.no_grad():
        return compute(node)


def call(
    program: Program,
    node: fx.Node,
    env: Mapping[fx.Node, object],
    given: Mapping[str, object],
    quantize: bool = True,
    casts: CastCache | None = None,
) -> object:
    """The value of one node from those of its operands and the inputs that are ``given`` by name."""
    if node.op == "placeholder":
        return given.get(str(node.target))
    if node.op == "get_attr":
        return runtime_weight(program, str(node.target), casts)
    if node.op != "call_function":
        raise ValueError(f"{node.name}: cannot execute a {node.op} node")
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: env[n])
    if node.target is _cast:
        return args[0].to(compute_dtype(program.dtype) if args[1] == "compute" else program.dtype)
    if node.target in _QUANTIZERS and not quantize:
        return args[0]
    try:
        return node.target(*args, **kwargs)
    except Exception as error:
        raise RuntimeError(f"{node.name} = {op_name(node)} failed: {error}") from error


def _check_unfused(program: Program) -> None:
    for node in program.nodes(*FUSED):
        raise ValueError(
            f"{node.name} = {op_name(node)} holds a quantizer, which cannot be left out; fuse quantizers last"
        )


def last_readers(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Node → operands that nobody needs once it has run."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    result: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op != "output" and (node.users or node.op != "get_attr"):
            last = max((*node.users, node), key=order.__getitem__)
            result.setdefault(last, []).append(node)
    return result
