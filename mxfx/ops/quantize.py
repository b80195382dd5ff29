"""``mxfx::fake_quantize``."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from mxfx.formats import Format, parse
from mxfx.ops.catalogue import Rounding, describe, plain
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
