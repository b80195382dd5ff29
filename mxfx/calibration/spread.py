"""Calibration samples spread over ranks: what each of them runs, and what all of them saw brought together.

A statistic runs the batches that ``parts`` gives and ends with ``total`` or ``concatenated``, in which all ranks meet.
So every rank has the same bits, and those of one process but for the order in which sums are taken: a rank cuts its
samples where one process cuts batches, and where chance decides it draws for the whole batch (``Part.rows``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mxfx.ground import ranks


@dataclass(frozen=True)
class Part:
    """Of a batch the samples that this rank runs.

    Attributes:
        ids: int64 ``(samples, length)``, those samples.
        first: where they begin in the batch.
        batch: samples of the whole batch, as one process runs it.
        skipped: samples of each batch that went before and that other ranks run; behind the first part none.
    """

    ids: Tensor
    first: int
    batch: int
    skipped: tuple[int, ...]

    def rows(self, draw: Callable[[int], Tensor], rows: int) -> Tensor:
        """What ``draw`` gives for this part, of so many ``rows``, when it is asked for all samples in their order, as
        one process asks: ``draw(n)`` gives n rows and moves a generator on.
        """
        each = rows // len(self.ids)
        for samples in self.skipped:
            draw(samples * each)
        return draw(self.batch * each)[self.first * each : self.first * each + rows]


def parts(tokens: Tensor, size: int) -> list[Part]:
    """This rank's share of the samples ``(samples, length)``, in batches of at most ``size``; there may be none."""
    mine = ranks.share(len(tokens))
    found: list[Part] = []
    skipped: list[int] = []
    for start in range(0, mine.stop, size):
        batch = tokens[start : start + size]
        first = max(mine.start - start, 0)
        ids = batch[first : mine.stop - start]
        if len(ids):
            found.append(Part(ids, first, len(batch), tuple(skipped)))
            skipped.clear()
        else:
            skipped.append(len(batch))
    return found


def total(own: Tensor | None, device: torch.device) -> Tensor | None:
    """The sum of what all ranks have on ``device``, in their order, the same on each; None where none has anything."""
    own = _shaped(own, device)
    return None if own is None else ranks.summed(own)


def concatenated(own: Tensor | None, dim: int, device: torch.device) -> Tensor | None:
    """What all ranks have on ``device`` along ``dim``, in their order: that of the samples; None where none has any."""
    own = _shaped(own, device, dim)
    return None if own is None else ranks.joined(own, dim)


def _shaped(own: Tensor | None, device: torch.device, dim: int | None = None) -> Tensor | None:
    """What a rank has; where it ran nothing, zeros of what the others have, of no length along ``dim``."""
    shapes = ranks.collected(None if own is None else (own.shape, own.dtype))
    known = next((one for one in shapes if one is not None), None)
    if own is not None or known is None:
        return own
    shape = list(known[0])
    if dim is not None:
        shape[dim] = 0
    return torch.zeros(shape, dtype=known[1], device=device)
