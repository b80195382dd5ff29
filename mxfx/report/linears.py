"""For each linear, which way its product runs, by how many rows there are, and why it takes no faster one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import fx

from mxfx.formats import Format, parse
from mxfx.graph.node import info, path_of
from mxfx.graph.program import Program
from mxfx.graph.regions import siblings
from mxfx.ops.catalogue import arguments_of, spec, weights_of
from mxfx.ops.kernels import packed
from mxfx.ops.kernels.limits import has_triton
from mxfx.ops.kernels.ways import Product, Way, no_fp8, said, summed, ways_on_cpu, ways_on_cuda, why_not_fp8
from mxfx.passes import Lower, MultiplyInFp8, PackWeights, UnpackWeights
from mxfx.pipeline.manager import StepResult
from mxfx.rewrite.operands import rounded_format

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
_FUSED = {*packed.MULTIPLYING.values(), packed.ADD_NORM_LINEAR}
#: What rows are called that a fused op rounds, and those of a product alone.
_INPUTS = ("x", "gate", "payload")


@dataclass(frozen=True)
class Linear:
    """Linears of all layers that are alike: ``path`` has ``*`` for the layer, ``count`` says how many they are.

    ``ways`` are rows, up to so many (None: all that are more), and how they run; ``why`` is empty where nothing stood
    in the way. On a CPU rows are texts that take a step together; whole texts go the last way.
    """

    path: str
    weight: str
    input: str
    ways: tuple[Way, ...]
    why: str
    count: int = 1

    def __str__(self) -> str:
        formats = f"{self.weight} × {self.input}" if self.input else self.weight
        reason = f" ({self.why})" if self.why else ""
        return f"{self.count} {self.path}, {formats}: {'; '.join(said(list(self.ways)))}{reason}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"ways": [{"rows": rows, "how": how} for rows, how in self.ways]}


def linears_of(program: Program, steps: Sequence[StepResult]) -> list[Linear]:
    """Of a program that ``steps`` emitted; empty for one that none of them lowered."""
    # Of two phases, the prefill's result has the steps of both.
    mine = [step for step in steps if step.phase != "decode"]
    steps = mine if any(isinstance(step.pass_, Lower) for step in mine) else steps
    lowered = next((step.pass_ for step in steps if isinstance(step.pass_, Lower)), None)
    if lowered is None:
        return []
    reasons = _reasons(steps)
    target = lowered.device or "cpu"
    return _folded(
        _linear(name, product, target, reasons.get(name, ""))
        for node in program.graph.nodes
        for names, product in _products(node)
        for name in names
    )


def planned_linears(program: Program, target: str, sums: str, *, packs: bool) -> list[Linear]:
    """Of an annotated program that is not emitted yet, as its formats and sizes say; weights are not read."""
    found = []
    for linears in siblings(program).values():
        channels = sum(_channels(node) for node in linears)
        for node in linears:
            weight, x = (_annotated(node, operand) for operand in ("weight", "input"))
            source = spec(node).node_of("input")
            assert source is not None
            width, experts = int(source.meta["val"].shape[-1]), "expert" in spec(node).concept
            weight = weight if packs and "weight" in weights_of(node) else None
            why = "" if weight is None else no_fp8(weight, x, width, _channels(node)) or ""
            how = None if weight is None or x is None or experts or why else summed(sums, weight, x)
            product = Product(weight, x, width, channels, program.dtype, how, how is not None, experts)
            found.append(_linear(path_of(node) or node.name, product, target, why if target == "cuda" else ""))
    return _folded(found)


def linear_lines(found: Sequence[Linear]) -> Iterator[str]:
    """Those that run alike in one line."""
    alike: dict[Linear, list[Linear]] = {}
    for one in found:
        alike.setdefault(replace(one, path="", count=0), []).append(one)
    for like, group in alike.items():
        names = ", ".join(dict.fromkeys(one.path.rpartition(".")[2] for one in group))
        yield "linears: " + str(replace(like, path=names, count=sum(one.count for one in group)))


def _linear(path: str, product: Product, target: str, why: str) -> Linear:
    exact = _adds_in_float32()
    ways = ways_on_cuda(product, exact) if target == "cuda" else ways_on_cpu(product)
    if product.weight is None:
        why = why or "its weight has no format"
    elif target == "cuda":
        why = why_not_fp8(product, exact) or why
    weight = str(product.weight or str(product.dtype).removeprefix("torch."))
    return Linear(path, weight, str(product.input or ""), tuple(ways), why)


def _adds_in_float32() -> bool:
    """Whether FP8 products are summed exactly by the GPU here; where there is none, as on Hopper."""
    if not torch.cuda.is_available() or not has_triton():
        return True
    from mxfx.ops.kernels.e4m3_product import sums_in_float32

    return sums_in_float32(torch.device("cuda", torch.cuda.current_device()))


def _products(node: fx.Node) -> Iterator[tuple[list[str], Product]]:
    """The weights that a node of an emitted program multiplies by, side by side, and how."""
    if node.op != "call_function":
        return
    given: dict[str, Any] = {}
    if node.target in (*_FUSED, packed.LINEAR_E4M3, packed.LINEAR, packed.EXPERT_LINEAR):
        given = dict(zip(arguments_of(node.target), node.args, strict=False)) | node.kwargs
    if not given:
        if spec(node).product is None:
            return
        weight, source = weights_of(node).get("weight"), spec(node).node_of("input")
        if weight is not None and source is not None:
            product = Product(None, rounded_format(source), *_shape(source, [weight]), _dtype(node))
            yield [_name(weight)], product
        return
    codes = given["codes"] if isinstance(given["codes"], list | tuple) else [given["codes"]]
    source = next(given[name] for name in _INPUTS if name in given)
    experts, fused = node.target is packed.EXPERT_LINEAR, node.target in _FUSED
    in_fp8 = fused or node.target is packed.LINEAR_E4M3
    yield (
        [_name(part) for part in codes],
        Product(
            parse(str(given["weights" if fused else "format"])),
            parse(str(given["format"])) if fused else _format_of(source),
            *_shape(source, codes),
            _dtype(node),
            str(given.get("sums", "exact")) if in_fp8 else None,
            fused and "hadamard" not in str(node.target),
            experts,
        ),
    )


def _format_of(source: fx.Node) -> Format | None:
    """The format of rows; of E4M3's payload that of what was made into it."""
    if source.target is packed.E4M3_ROWS or source.target in packed.ROUNDING.values():
        inner = source.args[0]
        return rounded_format(inner if source.target is packed.E4M3_ROWS else source)
    first = source.args[0] if source.args else None
    is_part = getattr(source.target, "__name__", "") == "getitem" and isinstance(first, fx.Node)
    return _format_of(first) if is_part else rounded_format(source)


def _shape(source: fx.Node, parts: Sequence[fx.Node]) -> tuple[int, int]:
    return int(source.meta["val"].shape[-1]), sum(int(part.meta["val"].shape[-2]) for part in parts)


def _dtype(node: fx.Node) -> torch.dtype:
    val = node.meta["val"]
    return (val[0] if isinstance(val, tuple | list) else val).dtype


def _name(weight: fx.Node) -> str:
    return str(weight.target).removesuffix(".codes").removesuffix(".weight")


def _annotated(node: fx.Node, operand: str) -> Format | None:
    annotation = info(node).formats.get(operand)
    return None if annotation is None else annotation.format


def _channels(node: fx.Node) -> int:
    return int(node.meta["val"].shape[-1])


def _reasons(steps: Sequence[StepResult]) -> Mapping[str, str]:
    """Why a weight is not packed, or not multiplied in FP8, by its linear's path."""
    found: dict[str, str] = {}
    for step in steps:
        if isinstance(step.pass_, UnpackWeights):
            found |= {m.path: "no kernel of this machine multiplies its codes" for m in step.record.matches}
        if isinstance(step.pass_, PackWeights | MultiplyInFp8):
            found |= {skip.path: skip.reason for skip in step.record.skips}
    return found


def _folded(found: Iterable[Linear]) -> list[Linear]:
    counts: dict[Linear, int] = {}
    for one in found:
        like = replace(one, path=_NUMBER.sub("*", one.path))
        counts[like] = counts.get(like, 0) + 1
    return [replace(one, count=count) for one, count in counts.items()]
