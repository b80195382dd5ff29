"""A program from a text that was proven before: what it states of types is taken as it stands, no op is run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from mxfx.graph.program import Program
from mxfx.graph.text.parsing import Reader, read_by


@dataclass(frozen=True)
class Stated:
    """What a text says of an input: a dtype, and sizes, of which the symbolic ones are words."""

    dtype: torch.dtype
    shape: tuple[int | str, ...]


def parse_stated(text: str, store: Mapping[str, Tensor]) -> Program:
    """The lowered program that was printed as ``text``, to be built: ``parse`` for a text that it has read before.

    Weights are checked by hash as ever. Inputs have a ``Stated`` for their ``meta["val"]``, other nodes have none, and
    no node has a record of paths, formats and passes: no pass can work on such a program.

    Raises ``TextError`` with the line, ``HashMismatch`` for a weight of the store that is not the one named.
    """
    return read_by(_Reader(text.splitlines(), store))


class _Reader(Reader):
    def prepare(self) -> None:
        pass

    def describe(self, node: fx.Node) -> None:
        pass

    def rest(self, node: fx.Node, path: str) -> None:
        if node.op == "placeholder":
            dtype, _, shape = self.until_type_end().removesuffix("]").partition("[")
            sizes = (int(size) if size.isdecimal() else size for size in shape.split(", ") if size)
            node.meta["val"] = Stated(self.dtype_of(dtype), tuple(sizes))
