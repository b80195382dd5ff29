"""RMSNorm, a block transform shared by all blocks, and `fake_quantize`, in one pass over memory.

Importable only where `triton` is.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxfx.formats import Format, parse
from mxfx.ops.kernels.addressing import as_rows, is_walkable
from mxfx.ops.kernels.launch import KEPT_SHAPES, Launch
from mxfx.ops.kernels.quantize_triton import row_offset
from mxfx.ops.kernels.rounding_triton import grid_constants
from mxfx.ops.kernels.transform_triton import load_matrix, multiply, quantize_blocks

#: A row is held in registers.
MAX_ROW = 16384
ELEMENTS_PER_THREAD = 16
STAGES = 2


def fits(length: int, block: int) -> bool:
    """Whether rows of `length` elements in blocks of `block` are short enough for the kernel."""
    blocks = triton.next_power_of_2(triton.cdiv(length, block))
    return max(blocks, 16) * max(triton.next_power_of_2(block), 16) <= MAX_ROW


def norm_triton(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    offset: float,
    gain_first: bool,
    matrix: Tensor | None,
    signs: bool,
    fmt: Format | None,
) -> Tensor:
    """`rms_norm`, then `matrix` (b, b) on each block, then `fmt`; contiguous, shape and dtype of `x`.

    `x` is (..., hidden), bfloat16, float16 or float32; each of `matrix` and `fmt` may be None, the block of
    `fmt` divides b, and b divides hidden.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    if not is_walkable(x):
        x = x.contiguous()
    block = matrix.shape[-1] if matrix is not None else fmt.block if fmt and fmt.block else 32
    gain = "none" if weight is None else "first" if gain_first else "last"
    transform = "none" if matrix is None else "signs" if signs else "full"
    launch = _launch(x.shape, x.stride(), x.dtype, x.device, block, transform, gain, float(offset), eps, fmt)
    launch(x, x if weight is None else weight.contiguous(), x if matrix is None else matrix.contiguous(), out)
    return out


@lru_cache(maxsize=KEPT_SHAPES)
def _launch(
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    block: int,
    transform: str,
    gain: str,
    offset: float,
    eps: float,
    fmt: Format | None,
) -> Launch:
    rows = as_rows(shape, stride)
    padded, blocks = triton.next_power_of_2(block), triton.next_power_of_2(triton.cdiv(rows.length, block))
    if transform != "none":
        padded, blocks = max(padded, 16), max(blocks, 16)
    return Launch(
        _norm_kernel,
        lambda at_a_time: min(rows.count, at_a_time),
        (rows.count, rows.length, eps, *rows.arguments),
        {
            "GAIN_OFFSET": offset,
            "SCALE": block**-0.5,
            "TILE": blocks,
            "B": block,
            "PADDED": padded,
            "FORMAT_BLOCK": padded if fmt is None or fmt.block == block else fmt.block,
            "GAIN": gain != "none",
            "GAIN_FIRST": gain == "first",
            "TRANSFORM": transform != "none",
            "SIGNS": transform == "signs",
            "QUANTIZE": fmt is not None,
            "STAGES": STAGES,
            **grid_constants(fmt or parse("mxint8@32"), dtype),
        },
        tasks=rows.count,
        num_warps=min(max(blocks * padded // (32 * ELEMENTS_PER_THREAD), 1), 16),
    )


@triton.jit(do_not_specialize=["turns"])
def _norm_kernel(
    x_ptr,
    weight_ptr,
    matrix_ptr,
    y_ptr,
    rows,
    length,
    eps,
    size1,
    size2,
    stride0,
    stride1,
    stride2,
    turns,
    GAIN_OFFSET: tl.constexpr,
    SCALE: tl.constexpr,
    TILE: tl.constexpr,
    B: tl.constexpr,
    PADDED: tl.constexpr,
    FORMAT_BLOCK: tl.constexpr,
    GAIN: tl.constexpr,
    GAIN_FIRST: tl.constexpr,
    TRANSFORM: tl.constexpr,
    SIGNS: tl.constexpr,
    QUANTIZE: tl.constexpr,
    STAGES: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    MIN_BINADE: tl.constexpr,
    MAGIC: tl.constexpr,
    OFFSET: tl.constexpr,
    THRESHOLD: tl.constexpr,
    CLAMP: tl.constexpr,
    LARGEST: tl.constexpr,
    FLOAT: tl.constexpr,
    MSE: tl.constexpr,
    SUM: tl.constexpr,
    UNIT: tl.constexpr,
):
    """A program takes one row at a time as (blocks, block); weight and matrix stay in registers."""
    narrow = x_ptr.dtype.element_ty
    lane = tl.arange(0, PADDED)
    column = tl.arange(0, TILE)[:, None] * B + lane[None, :]
    inside = (lane < B)[None, :] & (column < length)
    if TRANSFORM:
        high, low = load_matrix(matrix_ptr, B, PADDED, SIGNS, narrow)
    if GAIN:
        gain = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
        if GAIN_FIRST:
            gain += GAIN_OFFSET
    for turn in tl.range(0, turns, num_stages=STAGES):
        row = tl.program_id(0) + turn * tl.num_programs(0)
        here = inside & (row < rows)
        start = row_offset(row, size1, size2, stride0, stride1, stride2)
        x = tl.load(x_ptr + start + column, mask=here, other=0.0).to(tl.float32)
        mean = tl.sum(tl.sum(x * x, axis=1), axis=0) / length
        y = x * tl.rsqrt(mean + eps)
        if GAIN:
            if not GAIN_FIRST:
                y = y.to(narrow).to(tl.float32)
            y = y * gain
        y = y.to(narrow).to(tl.float32)
        if TRANSFORM:
            y = multiply(y.to(narrow), high, low, SCALE, SIGNS).to(narrow).to(tl.float32)
        if QUANTIZE:
            y = quantize_blocks(
                y,
                TILE,
                PADDED,
                FORMAT_BLOCK,
                LOW,
                HIGH,
                MIN_BINADE,
                MAGIC,
                OFFSET,
                THRESHOLD,
                CLAMP,
                LARGEST,
                FLOAT,
                MSE,
                SUM,
                UNIT,
            )
        tl.store(y_ptr + row.to(tl.int64) * length + column, y.to(narrow), mask=here)
