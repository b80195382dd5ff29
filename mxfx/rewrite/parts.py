"""Weights that were cut into parts: which rows of which tensor of the source model each of them is."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mxfx.graph.program import Program

#: Note of a program: name in the source model → name of a part → its rows, as in ``0:16,48:64``.
NOTE = "parts-of-weights"


def note_parts(program: Program, source: str, part: str, rows: Tensor) -> None:
    """Remember that ``part`` is the ``rows`` of ``source``, in their order."""
    known = dict(program.notes.get(NOTE, {}))  # type: ignore[call-overload]
    known[source] = {**known.get(source, {}), part: _ranges(rows)}
    program.notes[NOTE] = known


def parts(program: Program) -> Mapping[str, Mapping[str, Tensor]]:
    """Name in the source model → name of a part → its rows, int64 ``(n,)``."""
    noted = program.notes.get(NOTE, {})
    return {source: {part: _rows(text) for part, text in held.items()} for source, held in noted.items()}


def whole(program: Program, source: str) -> Tensor:
    """The tensor of a name in the source model, put together again where it was cut.

    Raises ``UnknownWeight`` for one that the program does not hold.
    """
    held = parts(program).get(source, {})
    if source in program.weights or not held:
        return program.weights[source]
    rows = torch.cat([program.weights[part] for part in held])
    return rows[torch.argsort(torch.cat(list(held.values()))).to(rows.device)]


def _ranges(rows: Tensor) -> str:
    starts = [0, *((rows.diff() != 1).nonzero().flatten() + 1).tolist()]
    ends = [*starts[1:], len(rows)]
    return ",".join(f"{int(rows[a])}:{int(rows[b - 1]) + 1}" for a, b in zip(starts, ends, strict=True))


def _rows(text: str) -> Tensor:
    ranges = (part.split(":") for part in text.split(","))
    return torch.cat([torch.arange(int(first), int(end)) for first, end in ranges])
