"""Hadamard transforms of high order, and `fake_quantize` behind one, in one pass over memory.

H = A ⊗ B / √(ab) takes a row, as a matrix X (a, b), to Aᵀ X B: two products with ±1 matrices on the tensor cores while
the row is in registers. A float32 row is multiplied as a sum of three bfloat16 terms, which hold its 24 bits; what the
first product leaves of a row in 16 bits, as a sum of two (relative error 2^-17, far under the 2^-9 of the result).

Importable only where `triton` is.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxfx.algorithms.hadamard import kronecker_orders, kronecker_signs
from mxfx.algorithms.launch import KEPT_SHAPES, Launch
from mxfx.formats import Format
from mxfx.ground.kept import Kept
from mxfx.ops.kernels.matrix_triton import quantize_blocks
from mxfx.ops.kernels.rounding_triton import as_stored, grid_of, narrowed

#: Elements of a thread of a short row and of a long one: fewer warps have more registers, which two products need.
PER_THREAD = (32, 64)
LONG = 8192


def kronecker_triton(x: Tensor, order: int, fmt: Format | None = None) -> Tensor:
    """`x` times the Hadamard matrix of an `order` above `DENSE_ORDER`, then `fmt`; contiguous, like `x`.

    Args:
        x: (..., n), n a multiple of `order`; bfloat16, float16 or float32. See `limits.takes_kronecker`.
        fmt: rounds the result, once that is rounded to x's dtype; its block divides the second factor's order.
    """
    x = x.contiguous()
    out = torch.empty_like(x)
    if out.numel():
        left, right = signs_of_factors(order, x.device)
        _launch(x.numel() // order, order, x.dtype, x.device, fmt)(x, left, right, out)
    return out


@Kept
def signs_of_factors(order: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The ±1 matrices of `kronecker_orders`, the first transposed."""
    left, right = kronecker_signs(order, torch.float32, device)
    return left.mT.contiguous(), right


@lru_cache(maxsize=KEPT_SHAPES)
def _launch(rows: int, order: int, dtype: torch.dtype, device: torch.device, fmt: Format | None) -> Launch:
    a, b = kronecker_orders(order)
    padded_a, padded_b = (max(triton.next_power_of_2(n), 16) for n in (a, b))
    return Launch(
        _kronecker_kernel,
        lambda at_a_time: min(rows, at_a_time),
        (rows,),
        {
            "SCALE": order**-0.5,
            "A": a,
            "B": b,
            "PADDED_A": padded_a,
            "PADDED_B": padded_b,
            # The interpreter multiplies no bfloat16; float32 holds all in the first term.
            "TERM": tl.bfloat16 if isinstance(_kronecker_kernel, triton.JITFunction) else tl.float32,
            "TERMS": 3 if dtype == torch.float32 else 2,
            "FORMAT_BLOCK": padded_b if fmt is None or fmt.block == b else fmt.block,
            "GRID": fmt and grid_of(fmt, dtype),
        },
        num_warps=max(1, padded_a * padded_b // (32 * PER_THREAD[padded_a * padded_b >= LONG])),
    )


@triton.jit
def _signs(matrix_ptr, N: tl.constexpr, PADDED: tl.constexpr):
    line = tl.arange(0, PADDED)
    inside = (line < N)[:, None] & (line < N)[None, :]
    return tl.load(matrix_ptr + line[:, None] * N + line[None, :], mask=inside, other=0.0)


@triton.jit(do_not_specialize=["rows"])
def _kronecker_kernel(
    x_ptr,
    left_ptr,
    right_ptr,
    y_ptr,
    rows,
    SCALE: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    PADDED_A: tl.constexpr,
    PADDED_B: tl.constexpr,
    TERM: tl.constexpr,
    TERMS: tl.constexpr,
    FORMAT_BLOCK: tl.constexpr,
    GRID: tl.constexpr,
):
    """A program keeps both matrices and takes one row at a time as (A, B)."""
    narrow = x_ptr.dtype.element_ty
    left = _signs(left_ptr, A, PADDED_A).to(TERM)
    right = _signs(right_ptr, B, PADDED_B).to(TERM if narrow == tl.float32 else narrow)
    line, lane = tl.arange(0, PADDED_A), tl.arange(0, PADDED_B)
    offset = line[:, None] * B + lane[None, :]
    inside = (line < A)[:, None] & (lane < B)[None, :]
    size = tl.full([], A * B, tl.int64)
    for row in tl.range(tl.program_id(0), rows, tl.num_programs(0)):
        x = tl.load(x_ptr + row * size + offset, mask=inside, other=0.0)
        if narrow == tl.float32:
            y = tl.zeros((PADDED_A, PADDED_B), tl.float32)
            for _ in tl.static_range(3):
                term = narrowed(x, TERM)
                y = tl.dot(term, right, y)
                x -= term.to(tl.float32)
        else:
            y = tl.dot(x, right)
        z = tl.zeros((PADDED_A, PADDED_B), tl.float32)
        for _ in tl.static_range(TERMS):
            term = narrowed(y, TERM)
            z = tl.dot(left, term, z)
            y -= term.to(tl.float32)
        y = as_stored(z * SCALE, narrow)
        if GRID is not None:
            y = quantize_blocks(y, FORMAT_BLOCK, GRID, narrow)
        tl.store(y_ptr + row * size + offset, y.to(narrow), mask=inside)
