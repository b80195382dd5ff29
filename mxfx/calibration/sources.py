"""Calibration tokens from one source or several: data sets by name, local texts, and what the float model writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mxfx.calibration.datasets import DatasetError, TokenSet, load_tokens, token_hash

#: The source that the float model writes itself.
SELF = "self"

#: Tokens of another source that a text which the float model goes on with begins with.
OPENING = 64

#: ``(samples, length, seed, openings)`` to int64 ids ``(samples, length)``, written by the float model; ``openings``,
#: int64 ``(samples, opening)`` or None, are what it goes on with.
Writer = Callable[[int, int, int, Tensor | None], Tensor]


def calibration_tokens(
    sources: Sequence[str],
    tokenizer: Any,
    *,
    samples: int,
    length: int,
    seed: int,
    shares: Sequence[float] = (),
    repeat: bool = False,
    continued: float = 0.0,
    writer: Writer | None = None,
) -> TokenSet:
    """``samples`` sequences of ``length`` tokens from ``sources`` in proportion to ``shares`` (equal without).

    Sequences of several sources stand in one random order, so that the first few and the last few are of every kind.
    ``repeat`` lets a text that is too short be read again (see ``load_tokens``). Of what ``self`` writes the part
    ``continued``, from 0 to 1, begins with ``OPENING`` tokens of the other sources, from all over them.

    Raises:
        DatasetError: a source is unknown, unreachable or too small; ``self`` without a model at hand.
    """
    counts = split_by_share(samples, shares or [1.0] * len(sources))
    texts = [source for source in sources if source != SELF]
    parts: list[TokenSet] = []
    for source, count in zip(sources, counts, strict=True):
        options = {"length": length, "seed": seed}
        if source != SELF and count:
            parts.append(load_tokens(source, tokenizer, samples=count, repeat=repeat, **options))
            continue
        gone_on = round(continued * count)
        if count - gone_on:
            parts.append(_written(writer, count - gone_on, length, seed))
        for text, share in zip(texts, split_by_share(gone_on, [1.0] * len(texts)), strict=True):
            parts += [_gone_on(writer, text, tokenizer, share, length, seed)] if share else []
    joined = [part.ids for part in parts]
    ids = joined[0] if len(joined) == 1 else _shuffled(torch.cat(joined), seed)
    return TokenSet(ids, token_hash(ids), ", ".join(sources), tuple(note for part in parts for note in part.notes))


def _written(writer: Writer | None, samples: int, length: int, seed: int, openings: Tensor | None = None) -> TokenSet:
    if writer is None:
        raise DatasetError("calibration data 'self' are written by the float model, and none is at hand here")
    ids = writer(samples, length, seed, openings)
    return TokenSet(ids, token_hash(ids), SELF)


def _gone_on(writer: Writer | None, text: str, tokenizer: Any, samples: int, length: int, seed: int) -> TokenSet:
    """Texts that the float model goes on with from openings of another source."""
    check_openings(length)
    openings = load_tokens(text, tokenizer, samples=samples, length=OPENING, seed=seed, repeat=True)
    notes = tuple(f"openings for self, {note}" for note in openings.notes)
    return replace(_written(writer, samples, length, seed, openings.ids), notes=notes)


def check_openings(length: int) -> None:
    """Raise ``DatasetError`` where an opening leaves nothing to write in a sample of ``length`` tokens."""
    if length <= OPENING:
        raise DatasetError(
            f"calibration.continued: samples of {length} tokens leave nothing to write behind openings of {OPENING}: "
            "raise calibration.length"
        )


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


def first_of(ids: Tensor, samples: int | None, length: int | None, by: str) -> Tensor:
    """The beginnings, of ``length`` tokens, of the first ``samples`` of calibration ids ``(samples, length)``, int64;
    None for all. Raises ``ValueError``, which names the pass that asks, for more than there are.
    """
    samples, length = samples or ids.shape[0], length or ids.shape[1]
    if samples > ids.shape[0] or length > ids.shape[1]:
        raise ValueError(
            f"{by}: samples = {samples}, length = {length} asks for more than the run's calibration data has, "
            f"{ids.shape[0]} samples of {ids.shape[1]} tokens; raise calibration.samples or calibration.length"
        )
    return ids[:samples, :length].contiguous()
