"""The quantizer behind a node, with or without a transform before it: what the fusion passes look for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

from mxfx.graph.node import kind, operands, path_of
from mxfx.graph.program import Program
from mxfx.rewrite.facts import fact
from mxfx.rewrite.rewriter import Rewriter
from mxfx.rewrite.selector import Selector


@dataclass(frozen=True)
class Quantizer:
    """A node that rounds along the last axis; `matrix` transforms each block first, by signs if `hadamard`."""

    node: fx.Node
    format: str
    matrix: fx.Node | None = None
    hadamard: bool = False

    def __str__(self) -> str:
        return self.format if self.matrix is None else f"transform + {self.format}"

    def become(self, rw: Rewriter, op: torch._ops.OpOverload, *operands: object) -> None:
        """Let a call that gives the same stand in the quantizer's place."""
        rw.replace(self.node, rw.call(op, *operands, like=self.node, val=self.node.meta["val"]))


@fact("quantizers-fused", "quantizers may be part of other ops, where passes that look for them do not")
def quantizers_fused(program: Program) -> str | None:
    """Closes a stage: there may have been nothing to fuse, so there is nothing that a graph could contradict."""
    return None


def fuse_sole_quantizers(
    rw: Rewriter, producers: str, select: Selector, fuse: Callable[[dict[str, object], Quantizer], None]
) -> None:
    """``fuse(operands, quantizer)`` for each producer of a kind that a quantizer alone reads; others are skipped."""
    for node in rw.program.nodes(producers):
        if not select(path_of(node)):
            continue
        quantizer = sole_quantizer(node)
        if isinstance(quantizer, str):
            rw.skip(node, quantizer)
        elif rw.match(node, note=str(quantizer)):
            fuse(operands(node), quantizer)


def sole_quantizer(source: fx.Node) -> Quantizer | str:
    """The quantizer that alone reads `source`; else, as text, why there is none."""
    readers = list(source.users)
    if len(readers) != 1:
        return f"{len(readers)} nodes read it; only a sole quantizer can take it in"
    (reader,) = readers
    if kind(reader) not in ("fake_quantize", "transform_quantize") or reader.args[0] is not source:
        return f"its reader {reader.name} quantizes nothing"
    given = operands(reader)
    if kind(reader) == "transform_quantize":
        return Quantizer(reader, str(given["format"]), given["matrix"], bool(given["hadamard"]))  # type: ignore[arg-type]
    val = reader.meta["val"]
    if isinstance(val, torch.Tensor) and given["axis"] not in (-1, val.dim() - 1):
        return f"its reader {reader.name} quantizes along axis {given['axis']}, not the last"
    return Quantizer(reader, str(given["format"]))
