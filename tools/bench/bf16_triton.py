"""A bfloat16 product that no library of NVIDIA's has a part in: a second opinion on what another order of sums does.

Importable only where `triton` is.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _product(x_ptr, w_ptr, out_ptr, M, N, K, x_row, w_row, w_col, TILE: tl.constexpr, DEEP: tl.constexpr):
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    col = tl.program_id(1) * TILE + tl.arange(0, TILE)
    total = tl.zeros((TILE, TILE), tl.float32)
    for start in range(0, K, DEEP):
        k = start + tl.arange(0, DEEP)
        inside = k < K
        x = tl.load(x_ptr + row[:, None] * x_row + k, mask=(row < M)[:, None] & inside, other=0.0)
        w = tl.load(w_ptr + k[:, None] * w_row + col * w_col, mask=inside[:, None] & (col < N), other=0.0)
        total += tl.dot(x, w)
    place = out_ptr + row[:, None].to(tl.int64) * N + col
    tl.store(place, total.to(tl.bfloat16), mask=(row < M)[:, None] & (col < N))


def product(x: Tensor, weight: Tensor) -> Tensor:
    """(M, K) times (K, N), bfloat16; float32 sums, 64 terms on tensor cores and then added."""
    (rows, depth), columns = x.shape, weight.shape[1]
    out = x.new_empty(rows, columns)
    grid = (triton.cdiv(rows, 64), triton.cdiv(columns, 64))
    x = x.contiguous()
    _product[grid](x, weight, out, rows, columns, depth, x.stride(0), *weight.stride(), TILE=64, DEEP=64)
    return out
