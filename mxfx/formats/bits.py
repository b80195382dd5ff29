"""Where sign, exponent and mantissa lie in the two floating-point types that formats compute in."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class FloatLayout:
    """IEEE 754 binary interchange layout: the integer dtype of the same width, and its fields."""

    integer: torch.dtype
    mantissa_bits: int
    bias: int
    exponent_mask: int


@cache
def layout_of(dtype: torch.dtype) -> FloatLayout:
    """Layout of float32 or float64; `KeyError` for every other dtype."""
    return {
        torch.float32: FloatLayout(torch.int32, 23, 127, 0x7F80_0000),
        torch.float64: FloatLayout(torch.int64, 52, 1023, 0x7FF0_0000_0000_0000),
    }[dtype]
