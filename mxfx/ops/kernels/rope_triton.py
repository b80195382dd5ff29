"""RoPE, a block transform, and `fake_quantize` along the head dimension, in one pass over memory.

Importable only where `triton` is.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxfx.formats import Format, parse
from mxfx.ops.kernels.launch import KEPT_SHAPES, Launch
from mxfx.ops.kernels.rounding_triton import grid_constants
from mxfx.ops.kernels.transform_triton import load_matrix, multiply, quantize_blocks

TILE_ELEMENTS = 4096
MIN_ROWS = 16
ELEMENTS_PER_THREAD = 32


def rope_triton(x: Tensor, cos: Tensor, sin: Tensor, matrix: Tensor | None, signs: bool, fmt: Format | None) -> Tensor:
    """`rope`, then `matrix` on each block of the head dimension, then `fmt`; contiguous.

    `x` is (batch, heads, seq, head_dim) of any strides, last 1; `cos` and `sin` are (batch | 1, seq, head_dim).
    `matrix` is (b, b) or None, b divides head_dim, and the block of `fmt` divides b (or head_dim).
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    x = x if x.stride(-1) == 1 else x.contiguous()
    cos, sin = cos.to(x.dtype).contiguous(), sin.to(x.dtype).contiguous()
    block = matrix.shape[-1] if matrix is not None else fmt.block if fmt and fmt.block else x.shape[-1]
    transform = "none" if matrix is None else "signs" if signs else "full"
    launch = _launch(x.shape, x.stride(), x.dtype, x.device, cos.shape[0] == 1, block, transform, fmt)
    launch(x, cos, sin, x if matrix is None else matrix.contiguous(), out)
    return out


@lru_cache(maxsize=KEPT_SHAPES)
def _launch(
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    one_angle: bool,
    block: int,
    transform: str,
    fmt: Format | None,
) -> Launch:
    batch, heads, length, width = shape
    padded = triton.next_power_of_2(block)
    if transform != "none":
        padded = max(padded, 16)
    blocks = batch * heads * length * (width // block)
    tile = max(TILE_ELEMENTS // padded, MIN_ROWS)
    return Launch(
        _rope_kernel,
        lambda at_a_time: triton.cdiv(blocks, tile),
        (blocks, heads, length, *stride[:3], 0 if one_angle else length * width),
        {
            "WIDTH": width,
            "SCALE": block**-0.5,
            "TILE": tile,
            "B": block,
            "PADDED": padded,
            "FORMAT_BLOCK": padded if fmt is None or fmt.block == block else fmt.block,
            "TRANSFORM": transform != "none",
            "SIGNS": transform == "signs",
            "QUANTIZE": fmt is not None,
            **grid_constants(fmt or parse("mxint8@32"), dtype),
        },
        num_warps=max(1, tile * padded // (32 * ELEMENTS_PER_THREAD)),
        # A product that meets its sum in one FMA would skip a rounding that the separate ops make.
        enable_fp_fusion=False,
    )


@triton.jit
def _rope_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    matrix_ptr,
    y_ptr,
    blocks,
    heads,
    length,
    stride_batch,
    stride_head,
    stride_token,
    angle_stride,
    WIDTH: tl.constexpr,
    SCALE: tl.constexpr,
    TILE: tl.constexpr,
    B: tl.constexpr,
    PADDED: tl.constexpr,
    FORMAT_BLOCK: tl.constexpr,
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
    """One program, `TILE` consecutive blocks of the output; products and sums round as the separate ops do."""
    narrow = x_ptr.dtype.element_ty
    PER_ROW: tl.constexpr = WIDTH // B
    HALF: tl.constexpr = WIDTH // 2
    block = tl.program_id(0) * TILE + tl.arange(0, TILE)
    lane = tl.arange(0, PADDED)
    row = block // PER_ROW
    within = (block % PER_ROW) * B
    inside = (block < blocks)[:, None] & (lane < B)[None, :]
    if HALF % B == 0:
        # Whole blocks change places, so both loads stay 16 bytes wide.
        first = (within < HALF)[:, None]
        partner = tl.where(within < HALF, within + HALF, within - HALF)[:, None] + lane[None, :]
    else:
        channel = within[:, None] + lane[None, :]
        first = channel < HALF
        partner = tl.where(first, channel + HALF, channel - HALF)
    token = row % length
    head = (row // length) % heads
    sample = row // length // heads
    start = sample.to(tl.int64) * stride_batch + head.to(tl.int64) * stride_head + token.to(tl.int64) * stride_token
    angle = (sample.to(tl.int64) * angle_stride + token.to(tl.int64) * WIDTH + within)[:, None] + lane[None, :]
    x = tl.load(x_ptr + (start + within)[:, None] + lane[None, :], mask=inside, other=0.0).to(tl.float32)
    turned = tl.load(x_ptr + start[:, None] + partner, mask=inside, other=0.0).to(tl.float32)
    turned = tl.where(first, -turned, turned)
    cos = tl.load(cos_ptr + angle, mask=inside, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + angle, mask=inside, other=0.0).to(tl.float32)
    y = (x * cos).to(narrow).to(tl.float32) + (turned * sin).to(narrow).to(tl.float32)
    y = y.to(narrow).to(tl.float32)
    if TRANSFORM:
        high, low = load_matrix(matrix_ptr, B, PADDED, SIGNS, narrow)
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
    target = block.to(tl.int64)[:, None] * B + lane[None, :]
    tl.store(y_ptr + target, y.to(narrow), mask=inside)
