"""RMSNorm, a block transform shared by all blocks, and `fake_quantize`, in one pass over memory.

Importable only where `triton` is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxfx.formats import Format, parse
from mxfx.ops.kernels.addressing import as_rows, multiprocessors, on_device_of
from mxfx.ops.kernels.quantize_triton import row_offset
from mxfx.ops.kernels.rounding_triton import grid_constants
from mxfx.ops.kernels.transform_triton import load_matrix, multiply, quantize_blocks

#: A row is held in registers.
MAX_ROW = 16384
ELEMENTS_PER_THREAD = 16
PROGRAMS_PER_MULTIPROCESSOR = 16


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
    if x.numel() == 0:
        return out
    rows = as_rows(x)
    block = matrix.shape[-1] if matrix is not None else fmt.block if fmt and fmt.block else 32
    padded = triton.next_power_of_2(block) if matrix is None else max(triton.next_power_of_2(block), 16)
    blocks = triton.next_power_of_2(triton.cdiv(rows.length, block))
    blocks = max(blocks, 16) if matrix is not None else blocks
    programs = min(rows.count, multiprocessors(x) * PROGRAMS_PER_MULTIPROCESSOR)
    with on_device_of(x):
        _norm_kernel[(programs,)](
            rows.tensor,
            x if weight is None else weight.contiguous(),
            x if matrix is None else matrix.contiguous(),
            out,
            rows.count,
            triton.cdiv(rows.count, programs),
            rows.length,
            eps,
            *rows.arguments,
            GAIN_OFFSET=float(offset),
            SCALE=block**-0.5,
            TILE=blocks,
            B=block,
            PADDED=padded,
            FORMAT_BLOCK=padded if fmt is None or fmt.block == block else fmt.block,
            GAIN=weight is not None,
            GAIN_FIRST=gain_first,
            TRANSFORM=matrix is not None,
            SIGNS=signs,
            QUANTIZE=fmt is not None,
            **grid_constants(fmt or parse("mxint8@32"), x.dtype),
            num_warps=min(max(blocks * padded // (32 * ELEMENTS_PER_THREAD), 1), 16),
        )
    return out


@triton.jit
def _norm_kernel(
    x_ptr,
    weight_ptr,
    matrix_ptr,
    y_ptr,
    rows,
    turns,
    length,
    eps,
    size1,
    size2,
    stride0,
    stride1,
    stride2,
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
        matrix = load_matrix(matrix_ptr, B, PADDED, SIGNS)
    if GAIN:
        gain = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
        if GAIN_FIRST:
            gain += GAIN_OFFSET
    for turn in range(turns):
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
            y = multiply(y.to(narrow), matrix, SCALE, SIGNS).to(narrow).to(tl.float32)
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
