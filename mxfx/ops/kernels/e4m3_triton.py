"""Rows of E4M3 times rows of E4M3 on the tensor cores of Hopper and Ada, whose sums lose nothing that float32 holds.

Hopper's tensor cores align all products of an FP8 sum, and what was summed before, to the largest of them, and keep
some 14 bits: blocks of rows whose exponents span more octaves than that leaves lose their least bits. The products of
one block have one exponent, so a block's sum is exact; here each is added to the others in float32, by the ordinary
cores, which for half the products that tensor cores could do are as fast as they are.

Importable only where `triton` is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxfx.algorithms.launch import KEPT_SHAPES, Launch

#: Terms of one instruction of the tensor cores, which sums them without a loss if they have one exponent.
TERMS = 32


@dataclass(frozen=True)
class Tiling:
    """Rows, channels and terms of one turn of a program; row tiles that share a weight's tiles; warps; stages."""

    rows: int = 256
    channels: int = 128
    terms: int = 128
    group: int = 8
    warps: int = 8
    stages: int = 3


def multiply_rows_of_e4m3(
    x: Tensor,
    row_scales: Tensor,
    weight: Tensor,
    channel_scales: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    tiling: Tiling | None = None,
) -> None:
    """Write `residual + linear(x, weight, bias)` to `out` (m, n).

    x (m, k) and weight (n, k), both contiguous, are E4M3; row_scales (m,) and channel_scales (n,) powers of two,
    float32. The product with its bias is rounded to `out`'s dtype, and again with the residual (m, n), contiguous, of
    that dtype.
    """
    (rows, terms), channels = x.shape, weight.shape[0]
    launch = _launch(rows, terms, channels, x.device, bias is not None, residual is not None, tiling or Tiling())
    launch(
        x, row_scales, weight, channel_scales, out if bias is None else bias, out if residual is None else residual, out
    )


@lru_cache(maxsize=KEPT_SHAPES)
def _launch(
    rows: int, terms: int, channels: int, device: torch.device, bias: bool, residual: bool, tiling: Tiling
) -> Launch:
    tiles = triton.cdiv(rows, tiling.rows) * triton.cdiv(channels, tiling.channels)
    constants = {
        "ROWS": tiling.rows,
        "CHANNELS": tiling.channels,
        "TERMS": tiling.terms,
        "EXACT": TERMS,
        "GROUP": tiling.group,
        "EVEN": terms % tiling.terms == 0,
        "BIAS": bias,
        "RESIDUAL": residual,
        "STAGES": tiling.stages,
    }
    return Launch(_kernel, lambda at_a_time: tiles, (rows, channels, terms), constants, num_warps=tiling.warps)


@triton.jit
def _kernel(
    x_ptr,
    row_scales_ptr,
    weight_ptr,
    channel_scales_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    rows,
    channels,
    terms,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    TERMS: tl.constexpr,
    EXACT: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program, a tile of the result; `GROUP` tiles of rows go through all channels together."""
    across = tl.cdiv(channels, CHANNELS)
    down = tl.cdiv(rows, ROWS)
    each = GROUP * across
    first = tl.program_id(0) // each * GROUP
    size = tl.minimum(down - first, GROUP)
    place = tl.program_id(0) % each
    row = (first + place % size) * ROWS + tl.arange(0, ROWS)
    channel = place // size * CHANNELS + tl.arange(0, CHANNELS)
    term = tl.arange(0, TERMS)
    # Rows and channels beyond the last are those from the first on: what comes of them is not written.
    x_at = x_ptr + (row % rows).to(tl.int64)[:, None] * terms + term[None, :]
    weight_at = weight_ptr + (channel % channels).to(tl.int64)[:, None] * terms + term[None, :]
    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    for start in tl.range(0, terms, TERMS, num_stages=STAGES):
        if EVEN:
            x = tl.load(x_at)
            weight = tl.load(weight_at)
        else:
            inside = (term < terms - start)[None, :]
            x = tl.load(x_at, mask=inside, other=0.0)
            weight = tl.load(weight_at, mask=inside, other=0.0)
        total = tl.dot(x, weight.T, total, max_num_imprecise_acc=EXACT)
        x_at += TERMS
        weight_at += TERMS
    scale = tl.load(row_scales_ptr + row, mask=row < rows, other=0.0)
    factor = tl.load(channel_scales_ptr + channel, mask=channel < channels, other=0.0)
    total *= scale[:, None]
    total *= factor[None, :]
    if BIAS:
        total += tl.load(bias_ptr + channel, mask=channel < channels, other=0.0).to(tl.float32)[None, :]
    inside = (row < rows)[:, None] & (channel < channels)[None, :]
    at = row.to(tl.int64)[:, None] * channels + channel[None, :]
    y = total.to(out_ptr.dtype.element_ty)
    if RESIDUAL:
        y = y + tl.load(residual_ptr + at, mask=inside, other=0.0)
    tl.store(out_ptr + at, y, mask=inside)
