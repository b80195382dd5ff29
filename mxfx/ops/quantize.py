"""``mxfx::fake_quantize``."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from mxfx.formats import Format, parse
from mxfx.ops.catalogue import Rounding, describe, plain, shape_of
from mxfx.ops.dialect import define


@lru_cache(maxsize=256)
def _format(text: str) -> Format:
    return parse(text)


def _straight_through(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
    """Gradient of the identity (straight-through estimator, arXiv 1308.3432): rounding is flat almost everywhere."""
    return grad, None, None


def _same_shape(x: Tensor, format: str, axis: int = -1) -> Tensor:
    """Padding on fake tensors would fix symbolic sizes to those of their example."""
    _format(format)
    return torch.empty_like(x)


_INPUT = (plain("input", "x"),)
_ROUNDING = Rounding("format", "axis")


@define("fake_quantize", operands=_INPUT, rounds=_ROUNDING, backward=_straight_through, shape=_same_shape)
def fake_quantize(x: Tensor, format: str, axis: int = -1) -> Tensor:
    """Round ``x`` onto a format's grid along ``axis``; same shape and dtype (see ``mxfx.formats``).

    Raises ``FormatError`` for an unknown format.
    """
    return _format(format).fake_quantize(x, axis)


describe(fake_quantize, "fake_quantize", operands=_INPUT, rounds=_ROUNDING, shape=_same_shape)


_TOKENS = (shape_of("tokens"), plain("mask"))


@define("first_slots", operands=_TOKENS)
def first_slots(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Where each text of a batch ``(batch, seq)`` begins: how much padding stands before it, int64 ``(batch,)``."""
    if mask is None:
        return torch.zeros(tokens.shape[0], dtype=torch.int64, device=tokens.device)
    return (mask.ne(0).cumsum(-1) == 0).sum(-1)


describe(first_slots, "first_slots", operands=_TOKENS)


def is_first(places: Tensor, starts: Tensor, first: int) -> Tensor:
    """Which of ``places`` ``(places,)`` hold one of the ``first`` tokens of each text: boolean ``(batch, places)``."""
    place = places[None, :] - starts[:, None]
    return (place >= 0) & (place < first)


def _as_is(x: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(x)


@define("keep_first_quantize", rounds=Rounding(), fake=_as_is)
def keep_first_quantize(x: Tensor, starts: Tensor, slots: Tensor | None, first: int, format: str) -> Tensor:
    """``fake_quantize`` of keys or values along their last axis, but for the first tokens of each text.

    ``x`` is ``(batch, heads, seq, width)``; ``starts`` is what ``first_slots`` gives; ``slots``, int64 ``(seq,)``, are
    those of the tokens, None where a call begins with the first. Attention rests on these (arXiv 2309.17453).
    """
    places = torch.arange(x.shape[2], device=x.device) if slots is None else slots
    kept = is_first(places, starts, first)
    return torch.where(kept[:, None, :, None], x, torch.ops.mxfx.fake_quantize(x, format, -1))
