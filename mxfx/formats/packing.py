"""Dense storage of codes: `bits` bits a code, no gaps, least significant bit first.

A 4-bit type takes two codes a byte, the first in the low nibble (as OCP-style MXFP4 checkpoints store it).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def packed_length(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take."""
    return (count * bits + 7) // 8


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """The low `bits` bits of integer codes (..., n) as uint8 (..., ceil(n * bits / 8))."""
    if bits == 4:
        return _pack_nibbles(codes)
    if bits == 8:
        return codes.contiguous().view(torch.uint8)
    shifts = torch.arange(bits, device=codes.device, dtype=torch.int32)
    stream = ((codes.to(torch.int32).unsqueeze(-1) >> shifts) & 1).flatten(-2)
    stream = F.pad(stream, (0, -stream.shape[-1] % 8)).unflatten(-1, (-1, 8))
    weights = 1 << torch.arange(8, device=codes.device, dtype=torch.int32)
    return (stream * weights).sum(-1).to(torch.uint8)


def unpack_codes(packed: Tensor, bits: int, length: int, dtype: torch.dtype) -> Tensor:
    """The first `length` codes of bytes (..., k), as `dtype`; int8 codes are sign-extended."""
    if bits == 8:
        return packed[..., :length].contiguous().view(dtype)
    raw = _unpack_nibbles(packed) if bits == 4 else _unpack_stream(packed, bits)
    raw = raw[..., :length]
    if dtype != torch.int8:
        return raw.to(dtype)
    sign = 1 << (bits - 1)
    return ((raw ^ sign) - sign).to(torch.int8)


def _pack_nibbles(codes: Tensor) -> Tensor:
    nibbles = F.pad(codes.view(torch.uint8) & 0xF, (0, codes.shape[-1] % 2))
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def _unpack_nibbles(packed: Tensor) -> Tensor:
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2).to(torch.int32)


def _unpack_stream(packed: Tensor, bits: int) -> Tensor:
    shifts = torch.arange(8, device=packed.device, dtype=torch.int32)
    stream = ((packed.to(torch.int32).unsqueeze(-1) >> shifts) & 1).flatten(-2)
    count = stream.shape[-1] // bits
    weights = 1 << torch.arange(bits, device=packed.device, dtype=torch.int32)
    return (stream[..., : count * bits].unflatten(-1, (count, bits)) * weights).sum(-1).to(torch.int32)
