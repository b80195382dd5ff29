"""A tensor that lies on a format's grid, as packed codes and E8M0 scales, and back to its bits.

`Format.encode` rounds: it chooses a scale for each block anew, and a tensor that a solver put on the grid under other
scales would move. Here nothing rounds: `store` finds scales under which every entry is a code, or gives None.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mxfx.formats.e8m0 import (
    E8M0,
    E8M0_BIAS,
    MAX_EXPONENT,
    MIN_EXPONENT,
    NAN_EXPONENT,
    inverse_power_of_two,
    power_of_two,
)
from mxfx.formats.element import IntElement
from mxfx.formats.format import Format
from mxfx.formats.packing import packed_length
from mxfx.ground.kept import Kept

#: Dtypes of which one element has the width of several of another: a byte's codes are looked up all at once.


def store(values: Tensor, fmt: Format) -> tuple[Tensor, Tensor] | None:
    """Packed codes and scales of `values` (..., n), blocks along the last axis; None if they are not on the grid.

    Codes are uint8 (..., ceil(n · bits / 8)), scales uint8 E8M0 (..., ceil(n / block)); `restore` gives `values` back
    bit for bit (of a block with NaN or Inf, NaN). Each block gets the least exponent at which nothing saturates: its
    grid holds that of every greater one within range. None also for a format without blocks, with another scale than
    E8M0, or with codes wider than a byte.
    """
    if not stores(fmt) or fmt.block is None:
        return None
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    codes, scales = store_on_grid(values, fmt)
    length = values.shape[-1]
    found = restore(codes, scales, fmt, length, values.dtype)
    same = (found == values) & (found.signbit() == values.signbit())
    broken = (scales == NAN_EXPONENT + E8M0_BIAS).repeat_interleave(fmt.block, -1)[..., :length]
    return (codes, scales) if bool((same | broken).all()) else None


def stores(fmt: Format) -> bool:
    """Whether `store` knows a format: blocks, E8M0 scales, codes of at most a byte."""
    return fmt.block is not None and isinstance(fmt.scale, E8M0) and fmt.bits <= 8


def store_on_grid(values: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """What `store` gives for `values` that surely lie on the grid: nobody looks whether they do.

    No number is read back from the device, so that the call can be part of a CUDA graph.
    """
    assert fmt.block is not None
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    length = values.shape[-1]
    blocks = F.pad(values, (0, -length % fmt.block)).unflatten(-1, (-1, fmt.block))
    exponent = _least_exponent(blocks, fmt)
    scaled = blocks * inverse_power_of_two(exponent, blocks.dtype).unsqueeze(-1)
    rounded = fmt.element.round(scaled).masked_fill((exponent == NAN_EXPONENT).unsqueeze(-1), 0.0)
    codes = fmt.pack(fmt.element.to_codes(rounded).flatten(-2)[..., :length])
    return codes, (exponent + E8M0_BIAS).to(torch.uint8)


def restore(codes: Tensor, scales: Tensor, fmt: Format, length: int, dtype: torch.dtype) -> Tensor:
    """The (..., length) tensor behind packed codes and scales that `store` gave, as `dtype`; NaN where a scale is 255.

    Every product of a code and its scale is exact in float32; it is rounded once to a `dtype` that cannot hold it, as a
    cast of the float32 tensor would. Raises ``ValueError`` for rows of another length.
    """
    assert fmt.block is not None
    require_length(codes, scales, fmt, length)
    if dtype == torch.float16:
        return restore(codes, scales, fmt, length, torch.float32).to(dtype)
    values = _look_up(codes, fmt, dtype, length)
    scale = power_of_two(scales.to(torch.int32) - E8M0_BIAS, torch.float32).to(dtype)
    if length % fmt.block == 0:
        return values.unflatten(-1, (-1, fmt.block)).mul_(scale.unsqueeze(-1)).flatten(-2)
    return values.mul_(scale.repeat_interleave(fmt.block, -1)[..., :length])


def scales_length(length: int, fmt: Format) -> int:
    """Scales that a row of `length` entries has."""
    assert fmt.block is not None
    return -(-length // fmt.block)


def codes_length(length: int, fmt: Format) -> int:
    """Bytes that the packed codes of a row of `length` entries take."""
    return packed_length(length, fmt.bits)


def require_length(codes: Tensor, scales: Tensor, fmt: Format, length: int) -> None:
    """Raise ``ValueError`` for codes and scales that are not those of rows of ``length`` entries."""
    found, expected = (codes.shape[-1], scales.shape[-1]), (codes_length(length, fmt), scales_length(length, fmt))
    if found != expected or codes.shape[:-1] != scales.shape[:-1]:
        raise ValueError(
            f"rows of {length} in {fmt} are {expected[0]} bytes of codes and {expected[1]} scales each, got "
            f"{tuple(codes.shape)} and {tuple(scales.shape)}"
        )


def _least_exponent(blocks: Tensor, fmt: Format) -> Tensor:
    """The least exponent in [-127, 127] at which no entry of a block saturates; 128 for a block with NaN or Inf."""
    element = fmt.element
    high = blocks.amax(-1) / element.max_value
    least = element.min_value if isinstance(element, IntElement) else -element.max_value
    need = torch.maximum(high, blocks.amin(-1) / least)
    fraction, exponent = torch.frexp(need)  # need = fraction · 2^exponent, fraction in [0.5, 1)
    exponent = exponent - (fraction == 0.5).to(torch.int32)
    exponent = torch.where(need > 0, exponent.clamp(MIN_EXPONENT, MAX_EXPONENT), MIN_EXPONENT)
    # A quotient may round down to the power of two that its entry exceeds.
    bound = power_of_two(exponent, blocks.dtype)
    over = (blocks.amax(-1) > element.max_value * bound) | (blocks.amin(-1) < least * bound)
    exponent = torch.where(over, (exponent + 1).clamp_max(MAX_EXPONENT), exponent)
    return torch.where(blocks.isfinite().all(-1), exponent, NAN_EXPONENT).to(torch.int32)


def _look_up(codes: Tensor, fmt: Format, dtype: torch.dtype, length: int) -> Tensor:
    """Elements of the codes, (..., length), fresh memory."""
    per_byte = 8 // fmt.bits
    widths = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
    wide = widths.get(per_byte * dtype.itemsize)
    if 8 % fmt.bits or wide is None:
        return fmt.element.from_codes(fmt.unpack(codes, length), torch.promote_types(dtype, torch.float32)).to(dtype)
    table = _table(fmt, dtype, codes.device).view(wide).view(-1)
    found = table.index_select(0, codes.reshape(-1).to(torch.int32))
    return found.view(dtype).view(*codes.shape[:-1], -1)[..., :length]


@Kept
def _table(fmt: Format, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The elements that each byte stands for, (256, codes a byte)."""
    per_byte = 8 // fmt.bits
    every = torch.arange(256, dtype=torch.int32).to(torch.uint8).unsqueeze(-1)
    values = fmt.element.from_codes(fmt.unpack(every, per_byte), torch.promote_types(dtype, torch.float32))
    return values.to(dtype).to(device)
