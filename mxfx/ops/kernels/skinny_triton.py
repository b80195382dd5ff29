"""Some rows times packed weights on tensor cores: weights are decoded as they arrive, and never written.

For more rows than ordinary arithmetic keeps up with, and fewer than expanding the weight pays for. Products of grid
values are exact and summed in float32.

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
from mxfx.formats import Format
from mxfx.ops.kernels.early_triton import starts_early, wait
from mxfx.ops.kernels.nibbles_triton import nibbles
from mxfx.ops.kernels.packed_triton import codes_of, element, narrowed, power


@dataclass(frozen=True)
class Tiling:
    """Channels of one program; input channels of one turn of one split; splits; warps; turns whose loads are ahead."""

    channels: int
    width: int
    splits: int
    warps: int
    stages: int


def tiling_for(channels: int) -> Tiling:
    """For each number of channels the one that did best over five linears, 16 rows, on an H200; 24 were tried."""
    return Tiling(16, 128, 2, 2, 4) if channels >= 8192 else Tiling(16, 128, 4, 4, 4)


def multiply_some_rows(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    fmt: Format,
    out: Tensor,
    row_scales: Tensor | None = None,
) -> None:
    """Write `linear(x, w, bias)` to `out` (m, n), any row stride; x (m, k), contiguous. Codes of 4 or 8 bits.

    x is bfloat16 or float16, of `out`'s dtype, or E4M3 bytes with `row_scales`, a power of two a row.
    """
    (rows, width), channels = x.shape, codes.shape[0]
    tiling = tiling_for(channels)
    launch = _launch(rows, width, channels, out.stride(0), x.dtype, out.dtype, x.device, bias is not None, fmt, tiling)
    if _in_halfwords(fmt, out.dtype):
        codes = codes.view(torch.int16)
    launch(x, x if row_scales is None else row_scales, codes, scales, out if bias is None else bias, out)


def _in_halfwords(fmt: Format, dtype: torch.dtype) -> bool:
    """Whether four codes of a halfword are decoded two at a time, as bfloat16 by their bits."""
    return codes_of(fmt).mantissa < 0 and fmt.bits == 4 and dtype == torch.bfloat16


@lru_cache(maxsize=KEPT_SHAPES)
def _launch(
    rows: int,
    width: int,
    channels: int,
    out_stride: int,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    device: torch.device,
    bias: bool,
    fmt: Format,
    tiling: Tiling,
) -> Launch:
    assert fmt.block is not None
    early = starts_early(device, rows)
    return Launch(
        _some_rows_kernel,
        lambda at_a_time: triton.cdiv(channels, tiling.channels),
        (rows, channels, width, out_stride),
        {
            "ROWS": max(triton.next_power_of_2(rows), 16),
            "CHANNELS": tiling.channels,
            "SPLITS": tiling.splits,
            "BLOCKS": max(tiling.width // fmt.block, 1),
            "BLOCK": fmt.block,
            "PARTS": 1 if fmt.bits == 8 else 4 if _in_halfwords(fmt, out_dtype) else 2,
            "E4M3": dtype == torch.uint8,
            "BIAS": bias,
            "CODES": codes_of(fmt),
            "STAGES": tiling.stages,
            "EARLY": early,
        },
        num_warps=tiling.warps,
        launch_pdl=early,
    )


@triton.jit
def _some_rows_kernel(
    x_ptr,
    row_scales_ptr,
    codes_ptr,
    scales_ptr,
    bias_ptr,
    y_ptr,
    rows,
    channels,
    width,
    out_stride,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    E4M3: tl.constexpr,
    BIAS: tl.constexpr,
    CODES: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program, all rows and `CHANNELS` results. Warps share a turn's input channels, and sum at the end."""
    wait(EARLY)
    WIDTH: tl.constexpr = BLOCKS * BLOCK
    UNITS: tl.constexpr = BLOCK // PARTS
    kind = y_ptr.dtype.element_ty
    row = tl.arange(0, ROWS)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    real = channel < channels
    per_row = width // BLOCK
    split = tl.arange(0, SPLITS)
    block = tl.arange(0, BLOCKS)
    unit = tl.arange(0, UNITS)
    column = tl.arange(0, WIDTH)
    line = channel.to(tl.int64) * per_row
    total = tl.zeros((SPLITS, CHANNELS, ROWS), tl.float32)
    # Bytes are not fetched ahead by themselves: each turn loads the scales of the next.
    there = (split * BLOCKS)[:, None, None] + block[None, None, :]
    mask = (there < per_row) & real[None, :, None]
    ahead = tl.load(scales_ptr + (there + line[None, :, None]), mask=mask, other=0)
    for turn in tl.range(0, tl.cdiv(width, SPLITS * WIDTH), num_stages=STAGES):
        first = turn * (SPLITS * BLOCKS) + split * BLOCKS
        there = first[:, None, None] + block[None, None, :]
        mask = (there < per_row) & real[None, :, None]
        scale = power(ahead.to(tl.int32))[:, :, :, None]
        after = there + SPLITS * BLOCKS
        left = (after < per_row) & real[None, :, None]
        ahead = tl.load(scales_ptr + (after + line[None, :, None]), mask=left, other=0)
        at = (there + line[None, :, None])[:, :, :, None] * UNITS + unit[None, None, None, :]
        code = tl.load(codes_ptr + at, mask=mask[:, :, :, None], other=0)
        across = (first * BLOCK)[:, None, None] + column[None, None, :]
        inside = (row < rows)[None, :, None] & (across < width)
        x = tl.load(x_ptr + row[None, :, None] * width + across, mask=inside, other=0)
        if E4M3:
            x = x.to(tl.float8e4nv, bitcast=True).to(kind)
        if PARTS == 1:
            total = _added(code, scale, x, 0, total, CODES)
        elif PARTS == 2:
            x0, x1 = tl.split(tl.reshape(x, (SPLITS, ROWS, WIDTH // 2, 2)))
            total = _added(code, scale, x0, 0, total, CODES)
            total = _added(code, scale, x1, 1, total, CODES)
        else:
            even, odd = tl.split(tl.reshape(x, (SPLITS, ROWS, WIDTH // 2, 2)))
            x0, x2 = tl.split(tl.reshape(even, (SPLITS, ROWS, WIDTH // 4, 2)))
            x1, x3 = tl.split(tl.reshape(odd, (SPLITS, ROWS, WIDTH // 4, 2)))
            scale = narrowed(scale, tl.bfloat16)
            total = _added_of_four(code, scale, x0, 0, total)
            total = _added_of_four(code, scale, x1, 1, total)
            total = _added_of_four(code, scale, x2, 2, total)
            total = _added_of_four(code, scale, x3, 3, total)
    y = tl.sum(total, axis=0)
    if E4M3:
        y *= tl.load(row_scales_ptr + row, mask=row < rows, other=0.0)[None, :]
    if BIAS:
        y += tl.load(bias_ptr + channel, mask=real, other=0.0).to(tl.float32)[:, None]
    at = row.to(tl.int64)[None, :] * out_stride + channel[:, None]
    tl.store(y_ptr + at, y.to(kind), mask=real[:, None] & (row < rows)[None, :])


@triton.jit
def _added(code, scale, x, part: tl.constexpr, total, CODES: tl.constexpr):
    """`total` and the products of all codes number `part` of a byte with their entries of `x`."""
    shift: tl.constexpr = 32 - CODES.value.bits * (part + 1)
    weight = (element(code.to(tl.int32) << shift, CODES) * scale).to(x.dtype)
    weight = tl.reshape(weight, (code.shape[0], code.shape[1], code.shape[2] * code.shape[3]))
    return tl.dot(weight, tl.permute(x, (0, 2, 1)), total)


@triton.jit
def _added_of_four(code, scale, x, part: tl.constexpr, total):
    """The same for integers, number `part` of a halfword, and bfloat16."""
    scale = tl.broadcast_to(scale, code.shape)
    weight = nibbles(code, scale, part, x.dtype)
    weight = tl.reshape(weight, (code.shape[0], code.shape[1], code.shape[2] * code.shape[3]))
    return tl.dot(weight, tl.permute(x, (0, 2, 1)), total)
