"""What a program holds on its device, by kind, before it runs."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, fx

from mxfx.formats.stored import codes_length, scales_length
from mxfx.graph.program import NOMINAL_COMPUTE, NOMINAL_MODEL, Program, compute_dtype
from mxfx.ops.catalogue import spec
from mxfx.ops.kernels import packed
from mxfx.rewrite.operands import readers_of, weight_format
from mxfx.rewrite.size import packed_bits

#: Ops that decode a packed weight while they run, by what they call its codes and their own input.
_DECODING = (
    "mx_linear",
    "mx_expert_linear",
    "mx_linear_e4m3",
    *(op.name().partition("::")[2] for op in (*packed.MULTIPLYING.values(), packed.ADD_NORM_LINEAR)),
)


@dataclass(frozen=True)
class Memory:
    """Bytes, of one forward pass over `batch` rows of `seq` tokens with an empty cache.

    `codes` and `scales` are packed weights; `weights` all others, in the model's dtype; `constants` run in compute
    precision; `scratch` is the largest weight that is decoded at a time; `activations` are those that live at a time,
    at most.
    """

    codes: int
    scales: int
    weights: int
    constants: int
    scratch: int
    activations: int
    batch: int
    seq: int

    @property
    def stored(self) -> int:
        """What the model holds while it does nothing."""
        return self.codes + self.scales + self.weights + self.constants

    def __str__(self) -> str:
        parts = {name: value for name, value in asdict(self).items() if name not in ("batch", "seq") and value}
        told = ", ".join(f"{value / 1e6:,.1f} MB {name}" for name, value in parts.items())
        return f"{told} ({self.batch} × {self.seq} tokens)"

    def to_json(self) -> dict[str, int]:
        return asdict(self) | {"stored": self.stored}


def memory(program: Program, batch: int = 1, seq: int = 2048) -> Memory:
    """The account of a program. Before it is lowered, a weight that is annotated counts as it will be packed.

    `seq` is cut to the longest that the program takes.
    """
    longest = {symbol.name: symbol.high for symbol in program.symbols}
    seq = min(seq, longest.get("seq", seq))
    kinds = dict.fromkeys(("codes", "scales", "weights", "constants"), 0)
    for kind, size in (part for name in program.weights for part in _parts(program, name)):
        kinds[kind] += size
    sizes = _Sizes(program, batch, seq)
    scratch = max((sizes.decoded(node) for node in program.graph.nodes), default=0)
    return Memory(**kinds, scratch=scratch, activations=_peak(program.graph, sizes), batch=batch, seq=seq)


def multiplying(program: Program, seq: int) -> int:
    """Floating-point operations of one row of `seq` tokens in its products with weights, experts as they are chosen."""
    sizes = _Sizes(program, 1, seq)
    of = {node: spec(node).node_of("input") for node in program.products()}
    return sum(2 * sizes.count(node.meta["val"]) * x.meta["val"].shape[-1] for node, x in of.items() if x is not None)


def _parts(program: Program, name: str) -> Iterator[tuple[str, int]]:
    tensor = program.weights[name]
    if not tensor.is_floating_point():
        of_scales = name.endswith(".scales") or packed_bits(program, name) == 0
        yield ("scales" if of_scales else "codes") if tensor.dtype == torch.uint8 else "constants", tensor.nbytes
    elif name in program.weights.constants:
        yield "constants", tensor.numel() * compute_dtype(program.dtype).itemsize
    else:
        planned = {weight_format(reader, name, program) for reader in readers_of(program, name)}
        fmt = planned.pop() if len(planned) == 1 and "lowered" not in program.facts else None
        if fmt is None or fmt.block is None or tensor.dim() < 2:
            yield "weights", tensor.numel() * program.dtype.itemsize
        else:
            width, rows = tensor.shape[-1], math.prod(tensor.shape[:-1])
            yield "codes", rows * codes_length(width, fmt)
            yield "scales", rows * scales_length(width, fmt)


class _Sizes:
    """Bytes of values, dimensions filled in, dtypes those of the run."""

    def __init__(self, program: Program, batch: int, seq: int) -> None:
        roles = {NOMINAL_MODEL: program.dtype, NOMINAL_COMPUTE: compute_dtype(program.dtype)}
        self._dtypes: Mapping[torch.dtype, torch.dtype] = {} if "lowered" in program.facts else roles
        ids = next(n for n in program.graph.nodes if n.op == "placeholder").meta["val"]
        self._dims = {str(dim): size for dim, size in zip(ids.shape, (batch, seq), strict=True)}

    def of(self, val: object) -> int:
        if isinstance(val, list | tuple):
            return sum(map(self.of, val))
        if not isinstance(val, Tensor):
            return 0
        return self.count(val) * self._dtypes.get(val.dtype, val.dtype).itemsize

    def count(self, val: Tensor) -> int:
        """Elements."""
        return math.prod(map(self._size, val.shape))

    def decoded(self, node: fx.Node) -> int:
        """What a product decodes of its packed weights: E4M3 bytes, or numbers of its own dtype."""
        name = getattr(node.target, "__name__", "").partition(".")[0]
        if node.op != "call_function" or name not in _DECODING:
            return 0
        in_e4m3 = name not in ("mx_linear", "mx_expert_linear")
        codes = node.args[{"mx_linear_e4m3": 2}.get(name, 0)] if in_e4m3 else [node.args[1]]
        width = node.args[5 if name.endswith("_quantize_linear") else 0].meta["val"].shape[-1]
        rows: int = sum(part.meta["val"].shape[:-1].numel() for part in codes)
        if in_e4m3 and node.kwargs.get("sums") != "wide":
            return rows * width
        val = node.meta["val"][0] if isinstance(node.meta["val"], tuple) else node.meta["val"]
        return rows * width * self._dtypes.get(val.dtype, val.dtype).itemsize

    def _size(self, dim: object) -> int:
        if isinstance(dim, int):
            return dim
        expression = dim.node.expr
        # Dimensions of an empty cache.
        known = {symbol: self._dims.get(str(symbol), 0) for symbol in expression.free_symbols}
        return int(expression.subs(known))


def _peak(graph: fx.Graph, sizes: _Sizes) -> int:
    """The most bytes of computed values that are alive at a time; a view keeps alive what it looks at."""
    root: dict[fx.Node, fx.Node] = {}
    last: dict[fx.Node, int] = {}
    nodes = list(graph.nodes)
    for order, node in enumerate(nodes):
        if node.op == "call_function":
            first = node.args[0] if node.args else None
            root[node] = root.get(first, node) if isinstance(first, fx.Node) and _is_view(node) else node
        for operand in node.all_input_nodes:
            if operand in root:
                last[root[operand]] = order
    alive = most = 0
    ends: dict[int, int] = {}
    for order, node in enumerate(nodes):
        if root.get(node) is node:
            size = sizes.of(node.meta.get("val"))
            alive += size
            ends[last.get(node, order)] = ends.get(last.get(node, order), 0) + size
        most = max(most, alive)
        alive -= ends.get(order, 0)
    return most


def _is_view(node: fx.Node) -> bool:
    if node.target is operator.getitem:
        return True
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    return any(result.alias_info is not None for result in node.target._schema.returns)
