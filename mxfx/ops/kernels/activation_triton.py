"""What comes before a transform, in registers: sums, SiLU·up, RoPE and a norm, rounded as the separate ops round.

Importable only where `triton` is.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mxfx.ops.kernels.quantize_triton import row_offset
from mxfx.ops.kernels.rounding_triton import as_stored


@triton.jit
def silu_times(gate, up):
    """`silu(gate) * up` in float32, silu rounded to the dtype as the two separate ops do."""
    wide = gate.to(tl.float32)
    return as_stored(wide / (1.0 + tl.exp(-wide)), gate.dtype) * up.to(tl.float32)


@triton.jit
def rotate(x, turned, cos, sin, first):
    """RoPE of `x` and the channels that it turns with, in float32, each step rounded as the separate ops do."""
    one = as_stored(x.to(tl.float32) * cos.to(tl.float32), x.dtype)
    turned = turned.to(tl.float32)
    return one + as_stored(tl.where(first, -turned, turned) * sin.to(tl.float32), x.dtype)


@triton.jit
def load_sum(x_ptr, branch_ptr, at, mask, ADDED: tl.constexpr):
    """What lies `at` x; with `ADDED`, its sum with what lies there at branch, rounded to their dtype."""
    x = tl.load(x_ptr + at, mask=mask, other=0.0)
    if ADDED:
        branch = tl.load(branch_ptr + at, mask=mask, other=0.0)
        x = as_stored(x.to(tl.float32) + branch.to(tl.float32), x.dtype).to(x.dtype)
    return x


@triton.jit
def row_factors(
    x_ptr, branch_ptr, row, rows, length, size1, size2, stride0, stride1, stride2,
    COUNT: tl.constexpr, EPS: tl.constexpr, ADDED: tl.constexpr,
):  # fmt: skip
    """`rsqrt(mean(x²) + EPS)` of each of few whole rows, or sums (`load_sum`), for rows number `row`; float32."""
    CHUNK: tl.constexpr = 2048 // COUNT
    which = tl.arange(0, COUNT)
    start = row_offset(which, size1, size2, stride0, stride1, stride2)
    squares = tl.zeros((COUNT, CHUNK), tl.float32)
    for at in range(0, length, CHUNK):
        lane = at + tl.arange(0, CHUNK)
        there = (which < rows)[:, None] & (lane < length)[None, :]
        x = load_sum(x_ptr, branch_ptr, start[:, None] + lane[None, :], there, ADDED).to(tl.float32)
        squares += x * x
    factor = tl.rsqrt(tl.sum(squares, axis=1) / length + EPS)
    return tl.sum(tl.where(row[:, None] == which[None, :], factor[None, :], 0.0), axis=1)
