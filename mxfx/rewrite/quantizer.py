"""The quantizer behind a node, with or without a transform before it: what the fusion passes look for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from mxfx.graph.node import kind, operands


@dataclass(frozen=True)
class Quantizer:
    """A node that rounds along the last axis; `matrix` transforms each block first, by signs if `hadamard`."""

    node: fx.Node
    format: str
    matrix: fx.Node | None = None
    hadamard: bool = False

    def __str__(self) -> str:
        return self.format if self.matrix is None else f"transform + {self.format}"


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
