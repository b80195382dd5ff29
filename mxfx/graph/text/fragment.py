"""A part of a printed program as a program: what a header would say is filled in, weights are random."""

from __future__ import annotations

import hashlib
import re

import torch
from torch import Tensor

from mxfx.graph.program import Program
from mxfx.graph.text.parsing import Reader
from mxfx.graph.weights import WeightStore

SEPARATOR = "// -----"

_HEADER = ("dtype", "symbols", "facts")
_WEIGHT = re.compile(r"  @(\S+) : (\w+)\[([\d, ]*)\]( constant)?")
_DIMENSIONS = re.compile(r" : \w+\[([^\]]*)\]")


def parse_fragment(text: str, seed: int = 0) -> Program:
    """The program of graph lines, with any inputs and any result.

    Before them may stand lines ``dtype``, ``symbols`` and ``facts`` as in a header, and under ``weights`` the shapes of
    the weights, ``  @name : f32[2, 3]``: nearly normal numbers that follow from ``seed`` and
    the name, the same on every machine. Sizes that no ``symbols`` line names have the range [2, 4096].

    Raises ``TextError`` with line, column and a caret.
    """
    return _Fragment(text, seed).program()


class _Fragment(Reader):
    def __init__(self, text: str, seed: int) -> None:
        super().__init__(text.splitlines(), None)
        self.seed = seed

    def program(self) -> Program:
        names = {
            name for dims in _DIMENSIONS.findall("\n".join(self.lines)) for name in re.findall(r"[A-Za-z_]\w*", dims)
        }
        header = {"source": '"fragment"', "symbols": ", ".join(f"{name} in [2, 4096]" for name in sorted(names))}
        self.advance()
        while (key := self.line.partition(" ")[0]) in _HEADER:
            header[key] = self.line.partition(" ")[2]
            self.advance()
        weights = self.weights() if self.line == "weights" else WeightStore({})
        if self.line != "graph":
            self.number -= 1
        return self.build(header, weights)

    def weights(self) -> WeightStore:
        tensors: dict[str, Tensor] = {}
        constants = set()
        while self.advance() and (found := _WEIGHT.fullmatch(self.line)):
            shape = [int(size) for size in found[3].split(", ") if size]
            tensors[found[1]] = self.random(found[1], shape, self.dtype_of(found[2]))
            constants |= {found[1]} if found[4] else set()
        return WeightStore(tensors, {}, constants=frozenset(constants))

    def random(self, name: str, shape: list[int], dtype: torch.dtype) -> Tensor:
        digest = hashlib.blake2b(f"{self.seed}/{name}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
        if not dtype.is_floating_point:
            return torch.randint(0, 8, shape, generator=generator).to(dtype)
        # Twelve uniform numbers have the variance of one normal number, and a sum of integers rounds nowhere.
        return (torch.randint(-(2**16), 2**16, (12, *shape), generator=generator).sum(0) / 2**17).to(dtype)
