"""Activations that lie on an MX grid as E4M3 bytes and one power of two a row: exact, and what FP8 tensor cores take.

Importable only where `triton` is.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxfx.algorithms.launch import KEPT_SHAPES, Launch
from mxfx.ops.kernels.packed_triton import e4m3_bits

#: Elements of one program, where a row has fewer; a thread's share of them.
TILE_ELEMENTS = 4096
PER_THREAD = 16


def rows_to_e4m3(x: Tensor, payload: Tensor, row_scales: Tensor, inexact: Tensor) -> None:
    """Write rows of `x` (m, k), contiguous, as E4M3 bytes, uint8 (m, k), and their powers of two, float32 (m,).

    `inexact`, int64 (1,), grows by the rows of which E4M3 does not hold every entry; those are rounded to nearest.
    """
    _launch(x.shape, x.dtype, x.device)(x, payload, row_scales, inexact)


@lru_cache(maxsize=KEPT_SHAPES)
def _launch(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Launch:
    rows, width = shape
    padded = triton.next_power_of_2(width)
    tile = max(TILE_ELEMENTS // padded, 1)
    return Launch(
        _rows_kernel,
        lambda at_a_time: triton.cdiv(rows, tile),
        (rows, width),
        {"TILE": tile, "PADDED": padded},
        num_warps=min(max(tile * padded // (32 * PER_THREAD), 1), 16),
    )


@triton.jit
def _rows_kernel(x_ptr, payload_ptr, scales_ptr, inexact_ptr, rows, width, TILE: tl.constexpr, PADDED: tl.constexpr):
    """One program, `TILE` rows; the largest entry of a row comes to lie in [128, 256)."""
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    lane = tl.arange(0, PADDED)
    inside = (row < rows)[:, None] & (lane < width)[None, :]
    at = row.to(tl.int64)[:, None] * width + lane[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    magnitude = x.to(tl.int32, bitcast=True) & 0x7FFF_FFFF
    exponent = tl.max(magnitude, axis=1) >> 23
    scale = tl.minimum(tl.maximum(exponent - 7, 1), 253)
    inverse = ((254 - scale) << 23).to(tl.float32, bitcast=True)
    payload, exact = e4m3_bits(x * inverse[:, None])
    tl.store(payload_ptr + at, payload.to(tl.uint8), mask=inside)
    tl.store(scales_ptr + row, (scale << 23).to(tl.float32, bitcast=True), mask=row < rows)
    beyond = tl.sum(1 - tl.min(exact, axis=1), axis=0)
    if beyond > 0:
        tl.atomic_add(inexact_ptr, beyond.to(tl.int64))
