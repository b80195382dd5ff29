"""``transform-embedding``: the embedding, and a head tied to it, in a basis where few bits lose less."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from mxfx.algorithms.block_transform import apply_blocks
from mxfx.algorithms.hadamard import hadamard_matrix, has_hadamard
from mxfx.graph.node import info, kind, path_of
from mxfx.graph.program import Program
from mxfx.ops.catalogue import spec
from mxfx.rewrite import ALL, Close, Context, Numerics, Pass, Rewriter, Selector, register
from mxfx.rewrite.basis import change_input
from mxfx.rewrite.facts import ACTIVATIONS_QUANTIZED, LOWERED, RAISED, WEIGHTS_ROUNDED, Fact
from mxfx.rewrite.operands import readers_of


@register
@dataclass(frozen=True)
class TransformEmbedding(Pass):
    """Store an embedding in another basis: each block of its rows times a Hadamard matrix, which readers undo.

    Before::

        %x = embedding(@E, %ids); …; %y = linear(%h, @E)

    After::

        %r = embedding(@E H, %ids); %x = mxfx.hadamard(%r, 32); …
        %t = mxfx.hadamard(%h, 32); %y = linear(%t, @E H)

    Embeddings have large channels, for which a block's scale is too coarse: on SmolLM2-135M the squared error of MXINT4
    is .0200 of the embedding, and .0122 in this basis; alone rounded, untuned, it costs .17 nats of KL instead of .30.
    The head stays tied, a row costs ``block`` · log ``block`` sums and nothing is stored. H is symmetric, so it undoes
    itself. Only embeddings with a weight format are taken, or all where nothing is annotated.

    block: order of the matrix, a power of two.
    """

    name: ClassVar[str] = "transform-embedding"
    requires: ClassVar[frozenset[Fact]] = frozenset({RAISED})
    forbids: ClassVar[frozenset[Fact]] = frozenset({WEIGHTS_ROUNDED, ACTIVATIONS_QUANTIZED, LOWERED})
    numerics: ClassVar[Numerics] = Close(1e-9)
    block: int = 32
    select: Selector = ALL

    def __post_init__(self) -> None:
        if self.block < 2 or self.block & (self.block - 1):
            raise ValueError(f"'block' is {self.block}, must be a power of two: others' Hadamard matrices undo nothing")

    def run(self, rw: Rewriter, ctx: Context) -> None:
        seen: set[str] = set()
        for node in filter(self.selects, rw.program.nodes("embedding")):
            name = rw.weights.canonical(rw.program.weight_of(node))
            if name in seen:
                continue
            seen.add(name)
            readers = readers_of(rw.program, name)
            reason = self._unfit(rw.program, node, readers)
            if reason is not None:
                rw.skip(node, reason)
            elif rw.match(node, note=f"hadamard {self.block}, {len(readers)} readers"):
                self._transform(rw, node, readers)

    def selects(self, node: fx.Node) -> bool:
        return kind(node) == "embedding" and self.select(node)

    def _unfit(self, program: Program, node: fx.Node, readers: list[fx.Node]) -> str | None:
        if "annotated" in program.facts and "weight" not in info(node).formats:
            return "its weight has no format"
        width = node.meta["val"].shape[-1]
        if width % self.block or not has_hadamard(self.block):
            return f"blocks of {self.block} do not divide its {width} channels"
        other = next((n for n in readers if kind(n) != "embedding" and spec(n).concept != "linear"), None)
        return None if other is None else f"{path_of(other) or other.name} reads its weight too, and is no linear"

    def _transform(self, rw: Rewriter, node: fx.Node, readers: list[fx.Node]) -> None:
        blocks = hadamard_matrix(self.block, torch.float64).expand(node.meta["val"].shape[-1] // self.block, -1, -1)

        def change(x: Tensor) -> Tensor:
            return apply_blocks(x, blocks)

        change_input(rw, node, change)
        op = torch.ops.mxfx.hadamard.default
        for reader in readers:
            if kind(reader) == "embedding":
                users = list(reader.users)
                new = rw.call(op, reader, self.block, like=reader, after=reader, val=reader.meta["val"])
                for user in users:
                    user.replace_input_with(reader, new)
            else:
                new = rw.call(op, spec(reader).get("input"), self.block, like=reader)
                spec(reader).set(rw, "input", new)
