"""Operands that carry formats: which are quantized or rounded already, and who reads a weight."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from mxfx.formats import Format, FormatError, parse
from mxfx.graph.node import info, path_of
from mxfx.graph.program import Program
from mxfx.ops.catalogue import Rounded, arguments_of, spec, weights_of
from mxfx.rewrite.facts import CALIBRATED, WEIGHTS_ROUNDED, Selected
from mxfx.rewrite.rewriter import Rewriter

_ROUNDED = "rounded"
_fake_quantize = torch.ops.mxfx.fake_quantize.default
_QUANTIZERS = (_fake_quantize, torch.ops.mxfx.keep_first_quantize.default)


def is_quantized(node: object, fmt: Format, axis: int = -1) -> bool:
    """Whether ``node`` already rounds onto ``fmt`` along ``axis``."""
    return isinstance(node, fx.Node) and node.target in _QUANTIZERS and spec(node).rounds == Rounded(str(fmt), axis)


def quantized(rw: Rewriter, source: fx.Node, fmt: Format, axis: int = -1) -> fx.Node:
    """The node that rounds ``source`` onto ``fmt``: the one that is there, or a new one right behind ``source``."""
    for user in source.users:
        if is_quantized(user, fmt, axis):
            return user
    return rw.call(_fake_quantize, source, str(fmt), axis, like=source, after=source, val=source.meta["val"])


def quantize_operand(rw: Rewriter, node: fx.Node, operand: str) -> None:
    """Let an annotated operand come from a quantizer of its format; matched, or skipped where it does already."""
    fmt, axis = info(node).formats[operand].format, spec(node).axis(operand)
    source = spec(node).node_of(operand)
    assert source is not None and axis is not None
    if is_quantized(source, fmt, axis):
        rw.skip(node, f"its {operand} is in {fmt} already", done=True)
    elif rw.match(node, note=f"{operand} {fmt}"):
        spec(node).set(rw, operand, quantized(rw, source, fmt, axis))


def readers_of(program: Program, weight: str) -> list[fx.Node]:
    """Every node that reads the tensor behind ``weight``, under whichever of its names."""
    home = program.weights.canonical(weight)
    stored = program.graph.find_nodes(op="get_attr")
    sources = [node for node in stored if program.weights.canonical(str(node.target)) == home]
    return [user for source in sources for user in source.users]


def mark_rounded(rw: Rewriter, node: fx.Node, operand: str) -> None:
    """Note that an operand's tensor lies on the grid of its format."""
    rounded = (*info(node).notes.get(_ROUNDED, ()), operand)  # type: ignore[misc]
    rw.set_info(node, info(node).with_note(_ROUNDED, rounded))


def is_rounded(node: fx.Node, operand: str) -> bool:
    return operand in info(node).notes.get(_ROUNDED, ())


def not_rounded(program: Program, selected: Selected, wanted: Callable[[str], bool]) -> str | None:
    """The first annotated weight, of selected nodes and ``wanted`` operands, that lies on no grid; None for none."""
    for node in filter(selected, program.graph.nodes):
        for operand in weights_of(node):
            if wanted(operand) and operand in info(node).formats and not is_rounded(node, operand):
                fmt = info(node).formats[operand].format
                return f"the {operand} of {node.name} ({path_of(node)}) is to be {fmt} and is not rounded"
    return None


@WEIGHTS_ROUNDED.means
@CALIBRATED.means
def weights_rounded(program: Program, selected: Selected) -> str | None:
    """A bias that carries a format may stay: passes that solve for weights leave it."""
    return not_rounded(program, selected, lambda operand: operand != "bias")


def weight_format(node: fx.Node, weight: str, program: Program) -> Format | None:
    """The format under which ``node`` reads the tensor of that name; None if it reads it unquantized."""
    home = program.weights.canonical(weight)
    for operand, source in weights_of(node).items():
        if operand in info(node).formats and program.weights.canonical(str(source.target)) == home:
            return info(node).formats[operand].format
    return None


def rounded_format(x: fx.Node) -> Format | None:
    """The format that the values of a node lie in along the last axis, where the node itself rounds them."""
    if x.op != "call_function" or "quantize" not in getattr(x.target, "__name__", str(x.target)):
        return None
    names = list(arguments_of(x.target))
    given = dict(zip(names, x.args, strict=False)) | x.kwargs
    if given.get("axis", -1) not in (-1, x.meta["val"].dim() - 1):
        return None
    try:
        return parse(str(given["format"]))
    except (KeyError, FormatError):
        return None
