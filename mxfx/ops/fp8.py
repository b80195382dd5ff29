"""MX operands as FP8 E4M3 with one power of two a row: what the tensor cores of Hopper and Ada multiply.

A block's exponent folds into the payload: E4M3 holds code · 2^d exactly for 15 shifts d of a 4-bit code, so a row whose
blocks span few enough octaves loses nothing.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from mxfx.formats import E8M0, FloatElement, Format
from mxfx.formats.stored import restore

E4M3 = torch.float8_e4m3fn
#: Significant bits of E4M3, the leading one included.
SIGNIFICANT = 4
#: Products that one instruction sums, and bits that it keeps below the largest of them (Hopper, as measured).
SUMMED, KEPT = 32, 13


def to_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x` (..., k) as E4M3 bytes, uint8 (..., k), and the power of two of each row, float32 (..., 1).

    The largest entry of a row comes to lie in [128, 256). Entries that E4M3 does not hold are rounded to nearest, ties
    to even. The power of a row with NaN or Inf is NaN: every sum over it is.
    """
    wide = x.to(torch.float32)
    largest = wide.abs().amax(-1, keepdim=True)
    exponent = (largest.view(torch.int32) >> 23) - 7
    scale = (exponent.clamp(1, 253) << 23).view(torch.float32)
    scale = torch.where(largest.isfinite(), scale, float("nan"))
    return (wide / scale).to(E4M3).view(torch.uint8), scale


def from_rows(payload: Tensor, row_scales: Tensor, dtype: torch.dtype) -> Tensor:
    """What `to_rows` took, as `dtype`."""
    return (payload.view(E4M3).to(torch.float32) * row_scales).to(dtype)


@lru_cache(maxsize=256)
def not_carried(fmt: Format) -> str | None:
    """Why E4M3 does not hold entries of a format by one power of two a row, in words; None where it does, in as many
    octaves as a row leaves it.
    """
    element = fmt.element
    if fmt.block is None or not isinstance(fmt.scale, E8M0):
        return "which has no blocks with a power of two each"
    significant = element.mantissa_bits + 1 if isinstance(element, FloatElement) else element.bits - 1
    if significant > SIGNIFICANT:
        return "of which E4M3 does not hold the significant bits"
    if octaves_of(fmt) < 0:
        return "of which a block may span more octaves than E4M3 has"
    return None


@lru_cache(maxsize=256)
def octaves_of(fmt: Format) -> int:
    """By how many octaves the largest entry of a block may lie below its row's, so that E4M3 holds the block's least.

    The row's comes to lie in [128, 256), and 2^-9 is the least of E4M3. Negative: not even its own block's.
    """
    element = fmt.element
    if isinstance(element, FloatElement):
        return 16 - (element.max_exponent - element.min_exponent + element.mantissa_bits)
    return 16 - (fmt.bits - 1)


@lru_cache(maxsize=256)
def headroom(fmt: Format) -> int:
    """The greatest d at which every code of a format times 2^d is at most E4M3's largest number."""
    element = fmt.element
    largest = element.max_value if isinstance(element, FloatElement) else 2.0 ** (element.bits - 1)
    return math.floor(math.log2(torch.finfo(E4M3).max / largest))


def sums_exactly(first: Format, second: Format) -> bool:
    """Whether an instruction sums products of entries of two formats without a loss.

    It must not meet two blocks of a row, and the largest sum of its products must keep the bit of the smallest.
    """
    if any(fmt.block is None or fmt.block % SUMMED for fmt in (first, second)):
        return False
    return (SUMMED * _largest(first) * _largest(second)).bit_length() - 1 <= KEPT


def _largest(fmt: Format) -> int:
    """The largest magnitude of a block's entries, in units of the smallest difference of two of them."""
    element = fmt.element
    if isinstance(element, FloatElement):
        return int(math.ldexp(element.max_value, element.mantissa_bits - element.min_exponent))
    return 1 << (element.bits - 1)


def octaves_beyond(codes: Tensor, scales: Tensor, fmt: Format, width: int) -> int:
    """How many rows of a packed weight E4M3 does not hold with the power of two that kernels give a row.

    Under it the largest code of the block with the largest scale would be at most E4M3's largest number.
    """
    weight = restore(codes, scales, fmt, width, torch.float32)
    of_row = scales.to(torch.int32).amax(-1, keepdim=True) - headroom(fmt)
    of_row = (of_row.clamp(1, 254) << 23).view(torch.float32)
    return int((from_rows((weight / of_row).to(E4M3).view(torch.uint8), of_row, torch.float32) != weight).any(-1).sum())
