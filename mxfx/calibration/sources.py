"""Calibration tokens from one source or several: data sets by name, local texts, and what the float model writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mxfx.calibration.datasets import DatasetError, TokenSet, load_tokens, token_hash

#: The source that the float model writes itself.
SELF = "self"

#: ``(samples, length, seed)`` to int64 ids of that shape, written by the float model.
Writer = Callable[[int, int, int], Tensor]


def calibration_tokens(
    sources: Sequence[str],
    tokenizer: Any,
    *,
    samples: int,
    length: int,
    seed: int,
    shares: Sequence[float] = (),
    writer: Writer | None = None,
) -> TokenSet:
    """``samples`` sequences of ``length`` tokens from ``sources`` in proportion to ``shares`` (equal without).

    Sequences of several sources stand in one random order, so that the first few and the last few are of every kind.

    Raises:
        DatasetError: a source is unknown, unreachable or too small; ``self`` without a model at hand.
    """
    counts = split_by_share(samples, shares or [1.0] * len(sources))
    parts = [
        _one(source, tokenizer, count, length, seed, writer)
        for source, count in zip(sources, counts, strict=True)
        if count
    ]
    ids = parts[0] if len(parts) == 1 else _shuffled(torch.cat(parts), seed)
    return TokenSet(ids, token_hash(ids), ", ".join(sources))


def _one(source: str, tokenizer: Any, samples: int, length: int, seed: int, writer: Writer | None) -> Tensor:
    if source != SELF:
        return load_tokens(source, tokenizer, samples=samples, length=length, seed=seed).ids
    if writer is None:
        raise DatasetError("calibration data 'self' are written by the float model, and none is at hand here")
    return writer(samples, length, seed)


def _shuffled(ids: Tensor, seed: int) -> Tensor:
    return ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))]


def split_by_share(samples: int, shares: Sequence[float]) -> list[int]:
    """``samples`` divided in proportion to ``shares``; the largest remainders are rounded up, the parts sum up."""
    exact = [samples * share / sum(shares) for share in shares]
    counts = [int(x) for x in exact]
    rest = sorted(range(len(shares)), key=lambda i: counts[i] - exact[i])
    for index in rest[: samples - sum(counts)]:
        counts[index] += 1
    return counts
