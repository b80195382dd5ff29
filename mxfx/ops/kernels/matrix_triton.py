"""A block's product with a matrix, in registers, and the rounding of a tile that holds several blocks.

Importable only where `triton` is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mxfx.ops.kernels.rounding_triton import quantize_tile


def terms_of(matrix: torch.dtype, x: torch.dtype, signs: bool) -> int:
    """In how many terms `load_matrix` gives a matrix to `multiply` (three of tf32 count as 2)."""
    return 1 if signs or matrix == x != torch.float32 else 2


@triton.jit
def load_matrix(
    matrix_ptr,
    gain,
    B: tl.constexpr,
    PADDED: tl.constexpr,
    SIGNS: tl.constexpr,
    TERMS: tl.constexpr,
    NARROW: tl.constexpr,
):
    """Two (…, PADDED, PADDED) terms of (B, B) matrices that `multiply` takes, zero outside them.

    `matrix_ptr`: where one begins, or (n, 1, 1) such places. Of a Hadamard matrix the signs; `gain` (PADDED,), float32
    or None, multiplies the rows of any other.
    """
    line = tl.arange(0, PADDED)
    inside = (line < B)[:, None] & (line < B)[None, :]
    matrix = tl.load(matrix_ptr + line[:, None] * B + line, mask=inside, other=0.0)
    high = matrix
    if TERMS > 1 or SIGNS:
        matrix = matrix.to(tl.float32)
        if SIGNS:
            matrix = tl.where(matrix > 0, 1.0, tl.where(matrix < 0, -1.0, 0.0))
        if gain is not None:
            matrix *= gain[:, None]
        high = matrix
        if SIGNS or tl.bfloat16 == NARROW:
            high = matrix.to(NARROW)
    low = high
    if TERMS > 1 and tl.bfloat16 == NARROW:
        low = (matrix - high.to(tl.float32)).to(NARROW)
    return high, low


@triton.jit
def multiply(x, high, low, SCALE: tl.constexpr, SIGNS: tl.constexpr, TERMS: tl.constexpr):
    """`x` (rows, PADDED), of its own dtype, times the matrix of `load_matrix`; float32."""
    if x.dtype == tl.float32:
        product = tl.dot(x, high, input_precision="tf32x3")
    elif TERMS == 1:
        product = tl.dot(x, high)
    elif x.dtype == tl.bfloat16:
        product = tl.dot(x, high, tl.dot(x, low))
    else:
        product = tl.dot(x.to(tl.float32), high, input_precision="tf32x3")
    if SIGNS:
        product *= SCALE
    return product


@triton.jit
def quantize_blocks(x, FORMAT_BLOCK: tl.constexpr, GRID: tl.constexpr, dtype: tl.constexpr):
    """`quantize_tile` of a tile whose rows hold one or several blocks of the format."""
    rows: tl.constexpr = x.shape[0]
    width: tl.constexpr = x.shape[1]
    if width == FORMAT_BLOCK:
        y = quantize_tile(x, GRID, dtype)
    else:
        y = quantize_tile(tl.reshape(x, (rows * (width // FORMAT_BLOCK), FORMAT_BLOCK)), GRID, dtype)
        y = tl.reshape(y, (rows, width))
    return y
