"""NVFP4 weights as compressed-tensors stores them, found again from the numbers that they stand for.

A model in bfloat16 holds each weight as the bfloat16 nearest to element · block scale · tensor scale. The codes are not
kept beside it; but elements and block scales are so few that the numbers give them away, and each number bounds what
the tensor's scale can be. What is found is held against the weight, bit for bit, by the reader's own arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mxfx.formats import parse
from mxfx.formats.e4m3 import NVFP4_BLOCK, NVFP4_ELEMENT

_FORMAT = parse("nvfp4")
_TARGETS = (6.0, 4.0, 3.0, 2.0, 1.5, 1.0, 0.5)
"""What the largest magnitude of a block may be in units of its scale."""
_SCALES = tuple(eighths * 2.0**power for power in (5, 4) for eighths in (14, 13, 12, 11, 10, 9, 8, 7.5))
"""What the scale of the block with the tensor's largest magnitude may be; smaller ones are these, of larger units."""
_SMALLEST = 2.0**-6
#: A number in bfloat16 is within 2^-9 of what it rounds; the tensor's scale is guessed from one such number.
_SLACK = 2.0**-7
_GUESSED_ON = 4096
_TRIED = 17


@dataclass(frozen=True)
class StoredNVFP4:
    """codes: uint8 ``(rows, n)``; scales: float8_e4m3fn ``(rows, n / 16)``; divisor: float32 ``(1,)``, by which the
    reader divides every scale.
    """

    codes: Tensor
    scales: Tensor
    divisor: Tensor

    @property
    def packed(self) -> Tensor:
        """Two codes a byte, the first one low: uint8 ``(rows, n / 2)``."""
        return _FORMAT.pack(self.codes)

    def read(self) -> Tensor:
        """What compressed-tensors makes of it: a float32 product, rounded to bfloat16."""
        elements = NVFP4_ELEMENT.from_codes(self.codes, torch.float32).unflatten(-1, (-1, NVFP4_BLOCK))
        steps = self.scales.to(torch.bfloat16).float() / self.divisor
        return (elements * steps.unsqueeze(-1)).flatten(-2).to(torch.bfloat16)


def find_nvfp4(weight: Tensor) -> StoredNVFP4 | None:
    """What reads back as ``weight`` ``(rows, n)``, bit for bit; None where nothing does.

    That is the case for numbers that bfloat16 does not hold, that lie on no grid of NVFP4, or whose row is no whole
    number of blocks.
    """
    if (
        weight.dim() != 2
        or weight.shape[1] % NVFP4_BLOCK
        or not torch.equal(weight, weight.bfloat16().to(weight.dtype))
    ):
        return None
    blocks = weight.double().unflatten(-1, (-1, NVFP4_BLOCK))
    largest = blocks.abs().amax(-1)
    if not bool(largest.isfinite().all()):
        return None
    if not bool(largest.any()):
        return _stored(torch.zeros_like(blocks), torch.full_like(largest, _SMALLEST), 1.0)
    for unit in _units(blocks, largest):
        scales = _block_scales(blocks, largest, unit)
        if scales is None:
            continue
        elements = NVFP4_ELEMENT.round(blocks / (unit * scales).unsqueeze(-1))
        for refined in _refined(blocks, elements, scales):
            found = _stored(elements, scales, refined)
            if torch.equal(found.read().to(weight.dtype), weight):
                return found
    return None


def _units(blocks: Tensor, largest: Tensor) -> Iterator[float]:
    """Guesses of the tensor's scale that fit some of its blocks, those with the largest magnitudes among them."""
    sample = largest.flatten().topk(min(_GUESSED_ON, largest.numel())).indices
    some, peaks = blocks.flatten(0, 1)[sample], largest.flatten()[sample]
    peak = float(largest.max())
    for target in _TARGETS[:2]:
        for scale in _SCALES:
            if _block_scales(some, peaks, peak / (target * scale)) is not None:
                yield peak / (target * scale)


def _block_scales(blocks: Tensor, largest: Tensor, unit: float) -> Tensor | None:
    """A scale of E4M3 for each block under which its entries are elements, nearly; None if some block has none."""
    found = torch.where(largest == 0, _SMALLEST, 0.0).double()
    for target in _TARGETS:
        wanted = largest / (unit * target)
        scales = wanted.clamp(_SMALLEST, 448.0).float().to(torch.float8_e4m3fn).double()
        ratio = blocks / (unit * scales).unsqueeze(-1)
        elements = NVFP4_ELEMENT.round(ratio)
        fits = ((ratio - elements).abs() <= _SLACK * elements.abs()).all(-1)
        found = torch.where((found == 0) & fits, scales, found)
    return found if bool((found > 0).all()) else None


def _refined(blocks: Tensor, elements: Tensor, scales: Tensor) -> Iterator[float]:
    """Tensor scales between the bounds that the entries give: each is the bfloat16 nearest to its product."""
    product = (elements * scales.unsqueeze(-1)).abs()
    there = product > 0
    value, product = blocks.abs()[there], product[there]
    # The exponent of frexp: value in [2^(e - 1), 2^e), whose bfloat16 numbers are 2^(e - 8) apart.
    half = torch.ldexp(torch.ones_like(value), torch.frexp(value).exponent - 9)
    low, high = float(((value - half) / product).max()), float(((value + half) / product).min())
    # From the middle outwards, by more than float32 tells apart.
    width = max(high - low, 2.0**-22 * high)
    for step in range(_TRIED):
        away = (step + 1) // 2 * (1 if step % 2 else -1) / (_TRIED + 1)
        yield (low + high) / 2 + away * width


def _stored(elements: Tensor, scales: Tensor, unit: float) -> StoredNVFP4:
    codes = NVFP4_ELEMENT.to_codes(elements.float().flatten(-2))
    return StoredNVFP4(codes, scales.float().to(torch.float8_e4m3fn), torch.tensor([1.0 / unit], dtype=torch.float32))
