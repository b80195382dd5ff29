"""Operands that carry formats: which are quantized or rounded already, and who reads a weight."""

from __future__ import annotations

import torch
from torch import fx

from mxfx.formats import Format
from mxfx.graph.node import info, kind
from mxfx.graph.program import Program
from mxfx.rewrite.rewriter import Rewriter

#: Position of the operand that holds the tensor of an annotated weight or bias.
POSITION = {("linear", "weight"): 1, ("linear", "bias"): 2, ("embedding", "weight"): 0, ("rms_norm", "weight"): 1}

_ROUNDED = "rounded"
_fake_quantize = torch.ops.mxfx.fake_quantize.default


def is_quantized(node: object, fmt: Format, axis: int = -1) -> bool:
    """Whether ``node`` already rounds onto ``fmt`` along ``axis``."""
    return isinstance(node, fx.Node) and node.target is _fake_quantize and node.args[1:] == (str(fmt), axis)


def quantized(rw: Rewriter, source: fx.Node, fmt: Format, axis: int = -1) -> fx.Node:
    """The node that rounds ``source`` onto ``fmt``: the one that is there, or a new one right behind ``source``."""
    for user in source.users:
        if is_quantized(user, fmt, axis):
            return user
    return rw.call(_fake_quantize, source, str(fmt), axis, like=source, after=source, val=source.meta["val"])


def readers_of(program: Program, weight: str) -> list[fx.Node]:
    """Every node that reads the tensor behind ``weight``, under whichever of its names."""
    home = program.weights.canonical(weight)
    sources = [
        n for n in program.graph.nodes if n.op == "get_attr" and program.weights.canonical(str(n.target)) == home
    ]
    return [user for source in sources for user in source.users]


def mark_rounded(rw: Rewriter, node: fx.Node, operand: str) -> None:
    """Note that an operand's tensor lies on the grid of its format."""
    rounded = (*info(node).notes.get(_ROUNDED, ()), operand)  # type: ignore[misc]
    rw.set_info(node, info(node).with_note(_ROUNDED, rounded))


def is_rounded(node: fx.Node, operand: str) -> bool:
    return operand in info(node).notes.get(_ROUNDED, ())  # type: ignore[operator]


def weight_format(node: fx.Node, weight: str, program: Program) -> Format | None:
    """The format under which ``node`` reads the tensor of that name; None if it reads it unquantized."""
    home = program.weights.canonical(weight)
    for (of_kind, operand), position in POSITION.items():
        if of_kind != kind(node) or len(node.args) <= position or operand not in info(node).formats:
            continue
        source = node.args[position]
        if (
            isinstance(source, fx.Node)
            and source.op == "get_attr"
            and program.weights.canonical(str(source.target)) == home
        ):
            return info(node).formats[operand].format
    return None
