"""The quantizer behind a node, with or without a transform before it: what the fusion passes look for."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from mxfx.graph.node import kind, path_of
from mxfx.graph.program import Program
from mxfx.ops.catalogue import spec
from mxfx.rewrite.facts import LOWERED, QUANTIZERS_FUSED, RAISED, Fact, Selected
from mxfx.rewrite.numerics import Local, Numerics
from mxfx.rewrite.pass_ import NodePass
from mxfx.rewrite.rewriter import Rewriter


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


@QUANTIZERS_FUSED.means
def quantizers_fused(program: Program, selected: Selected) -> str | None:
    for node in filter(selected, program.graph.nodes):
        found = sole_quantizer(node)
        if not isinstance(found, str):
            return f"the quantizer {found.node.name} of {node.name} ({path_of(node)}) still stands apart"
    return None


@dataclass(frozen=True)
class QuantizerFusion(NodePass):
    """Base of the passes that let a producer take in the quantizer that alone reads it."""

    requires: ClassVar[frozenset[Fact]] = frozenset({RAISED})
    provides: ClassVar[frozenset[Fact]] = frozenset({QUANTIZERS_FUSED})
    forbids: ClassVar[frozenset[Fact]] = frozenset({LOWERED})
    numerics: ClassVar[Numerics] = Local(1e-2)

    def quantizer(self, node: fx.Node) -> Quantizer | str:
        """The quantizer that a producer can take in; else, as text, why there is none."""
        return sole_quantizer(node)

    @abstractmethod
    def fuse(self, rw: Rewriter, node: fx.Node, quantizer: Quantizer) -> None:
        """Put one call in the place of both."""

    def refuse(self, rw: Rewriter, node: fx.Node) -> str | None:
        found = self.quantizer(node)
        return found if isinstance(found, str) else None

    def note(self, node: fx.Node) -> str:
        return str(self.quantizer(node))

    def rewrite(self, rw: Rewriter, node: fx.Node) -> None:
        found = self.quantizer(node)
        assert not isinstance(found, str)
        self.fuse(rw, node, found)


def sole_quantizer(source: fx.Node) -> Quantizer | str:
    """The quantizer that alone reads `source`; else, as text, why there is none."""
    readers = list(source.users)
    if len(readers) != 1:
        return f"{len(readers)} nodes read it; only a sole quantizer can take it in"
    (reader,) = readers
    call, rounded = spec(reader), spec(reader).rounds
    if (
        kind(reader) not in ("fake_quantize", "transform_quantize")
        or rounded is None
        or call.get("input") is not source
    ):
        return f"its reader {reader.name} quantizes nothing"
    if kind(reader) == "transform_quantize":
        return Quantizer(reader, rounded.format, call.node_of("matrix"), bool(call.get("hadamard")))
    if rounded.axis != -1:
        return f"its reader {reader.name} quantizes along axis {rounded.axis}, not the last"
    return Quantizer(reader, rounded.format)
