"""The factor of a Hessian that column-by-column rounding needs, and the order to round in.

For a symmetric positive definite H, permuted to rounding order, H = R Rᵀ with R upper triangular. Then
H⁻¹ = Uᵀ U with U = R⁻¹, the matrix of the GPTQ paper (arXiv 2210.17323, §3.3, step 3), here by one Cholesky
factorization and one triangular inverse instead of two factorizations and a full inverse.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mxfx.ground import ranks

_ESCALATIONS = 3
_FIRST_DAMPING = 0.01
_SLAB = 1024
# Narrower triangular matrices are inverted by the library, wider ones by products of their halves' inverses: on CUDA a
# triangular solution in float64 takes several times as long as a product of that size.
_SOLVED = 256
# On CUDA the library's batched factorization is made for small matrices: wider ones go one by one.
_LOOPED = 512
# Ranks share the inverse of a matrix that is wider: of a narrow one its way to the others takes as long.
_SHARED_FROM = 8192


@dataclass(frozen=True)
class HessianFactor:
    """Factors of a stack of Hessians, in rounding order.

    Attributes:
        feedback: `(groups, n, n)` unit upper triangular, U_jk / U_jj: rounding column j with residual
            d = w - q moves column k > j by -d * feedback[j, k]. No division is left in the loop.
        precision: `(groups, n)`, 1 / U_jj²: the residual d of column j costs d² * precision[j].
        damping: `(groups,)` float64, the relative damping that made the matrix positive definite.
        ridge: `(groups,)` float64, what was added to the diagonal.
        failed: `(groups,)` bool; no damping of the ladder sufficed, the other fields are those of I.
    """

    feedback: Tensor
    precision: Tensor
    damping: Tensor
    ridge: Tensor
    failed: Tensor


def revive_dead_columns(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Gives columns that calibration never excited a diagonal, so that they can be factorized.

    A zero diagonal means a zero row, so the column couples with nothing: it is rounded to nearest and its
    error reaches nobody. Its diagonal becomes the smallest live one (1 if none lives), so that it has as
    little say in the block's exponent as any column seen; setting its weight to 0 instead, as the original
    GPTQ code does, would break the model on the first input that does excite it.

    Args:
        hessian: `(groups, n, n)`.

    Returns:
        The Hessian, unchanged if nothing is dead, and the mask of dead columns `(groups, n)`.
    """
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    dead = diagonal == 0
    if not dead.any():
        return hessian, dead
    smallest = diagonal.masked_fill(dead, torch.inf).amin(-1, keepdim=True)
    smallest = torch.where(smallest.isfinite(), smallest, 1.0)
    return hessian + torch.diag_embed(torch.where(dead, smallest, 0.0)), dead


def rounding_order(hessian: Tensor, block: int | None) -> Tensor:
    """Column order by falling activation energy that keeps MX blocks whole.

    Blocks are ordered by the sum of their diagonal, columns inside a block by the diagonal. A ragged last
    block stays last. Without blocks (None) all columns are ordered by the diagonal.

    Args:
        hessian: `(groups, n, n)`.

    Returns:
        `(groups, n)` int64.
    """
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    if block is None:
        return torch.argsort(diagonal, dim=-1, descending=True, stable=True)
    groups, n = diagonal.shape
    whole = n - n % block
    tiles = diagonal[:, :whole].reshape(groups, -1, block)
    inside = torch.argsort(tiles, dim=-1, descending=True, stable=True)
    across = torch.argsort(tiles.sum(-1), dim=-1, descending=True, stable=True)
    columns = torch.take_along_dim(inside, across[:, :, None], 1) + across[:, :, None] * block
    ragged = torch.argsort(diagonal[:, whole:], dim=-1, descending=True, stable=True) + whole
    return torch.cat([columns.flatten(1), ragged], dim=1)


def factorize(
    hessian: Tensor, order: Tensor, damping: float, dtype: torch.dtype, *, spread: bool = False
) -> HessianFactor:
    """Factorizes in float64, with ten times more damping, up to three times, where that fails.

    Args:
        hessian: `(groups, n, n)`, no zero on the diagonal.
        order: `(groups, n)` rounding order.
        damping: added to the diagonal, relative to its mean. From 0 the ladder goes on at 0.01.
        dtype: of `feedback` and `precision`.
        spread: every rank factorizes the same matrices, so that each inverts a part of wide ones.
    """
    mean = hessian.diagonal(dim1=-2, dim2=-1).double().mean(-1)
    used = torch.full_like(mean, damping)
    # Reversed, the lower Cholesky factor L of the permuted matrix is J R J.
    order = order.flip(-1)
    lower, info = _cholesky(hessian, order, used * mean)
    failed = torch.zeros_like(info, dtype=torch.bool)
    for attempt in range(_ESCALATIONS + 1):
        # The one wait for the device where nothing fails.
        pending = info.nonzero()[:, 0]
        if len(pending) == 0:
            break
        if attempt == _ESCALATIONS:
            lower[pending] = torch.eye(lower.shape[-1], dtype=torch.float64, device=lower.device)
            failed[pending] = True
            break
        used[pending] = (10 * used[pending]).clamp(min=_FIRST_DAMPING)
        ridge = (used * mean)[pending]
        lower[pending], info[pending] = _cholesky(hessian[pending], order[pending], ridge)
    precision = lower.diagonal(dim1=-2, dim2=-1).square().flip(-1).to(dtype)
    inverse = _unit_inverse(lower, dtype, spread and lower.shape[-1] >= _SHARED_FROM)
    return HessianFactor(inverse.flip(-2, -1), precision, used, used * mean, failed)


def _cholesky(hessian: Tensor, order: Tensor, ridge: Tensor) -> tuple[Tensor, Tensor]:
    """Lower factor in float64 of each permuted, damped matrix, and LAPACK's info, 0 for success."""
    matrix = permute_symmetric(hessian, order).double()
    matrix.diagonal(dim1=-2, dim2=-1).add_(ridge[:, None])
    if not matrix.is_cuda or len(matrix) == 1 or matrix.shape[-1] < _LOOPED:
        lower, info = torch.linalg.cholesky_ex(matrix)
        return lower, info
    infos = []
    for place, one in enumerate(matrix):
        lower, info = torch.linalg.cholesky_ex(one)
        matrix[place] = lower
        infos.append(info)
    return matrix, torch.stack(infos)


def _unit_inverse(lower: Tensor, dtype: torch.dtype, spread: bool = False) -> Tensor:
    """diag(L) L⁻¹, unit lower triangular, a slab of columns at a time.

    The slabs bound the float64 memory, and each skips the rows that are zero above it. With `spread` each rank computes
    some of them.
    """
    n = lower.shape[-1]
    scale = lower.diagonal(dim1=-2, dim2=-1)[:, :, None]
    inverse = torch.zeros_like(lower, dtype=dtype)
    starts = range(0, n, _SLAB)
    corners: dict[int, Tensor] = {}
    for start in _mine(starts) if spread else starts:
        slab = _slab(lower, start, corners)
        inverse[:, start:, start : start + _SLAB] = slab.mul_(scale[:, start:])
    return ranks.summed(inverse) if spread else inverse


def _slab(lower: Tensor, start: int, corners: dict[int, Tensor]) -> Tensor:
    """Columns of L⁻¹ from `start` on and down, by blocks of rows; `corners` keeps inverses of blocks on the diagonal.

    A product with a corner of L, unlike a triangular solution, needs no copy of it.
    """
    n = lower.shape[-1]
    if start + _SLAB >= n:
        # Nobody needs it behind the last slab.
        return corners[start] if start in corners else _triangular_inverse(lower[:, start:, start:])
    slab = lower.new_zeros(len(lower), n - start, _SLAB)
    for row in range(start, n, _SLAB):
        block, done = slice(row, min(row + _SLAB, n)), slice(start, row)
        if row not in corners:
            corners[row] = _triangular_inverse(lower[:, block, block])
        here = slab[:, row - start : block.stop - start]
        if row == start:
            here.copy_(corners[row])
        else:
            torch.bmm(corners[row], (lower[:, block, done] @ slab[:, : row - start]).neg_(), out=here)
    return slab


def _triangular_inverse(lower: Tensor) -> Tensor:
    """L⁻¹ of a stack of narrow lower triangular matrices."""
    n = lower.shape[-1]
    if n <= _SOLVED:
        return torch.linalg.solve_triangular(lower, torch.eye(n, dtype=lower.dtype, device=lower.device), upper=False)
    half = n // 2
    upper_half, lower_half = (_triangular_inverse(lower[:, part, part]) for part in (slice(half), slice(half, n)))
    inverse = torch.zeros_like(lower)
    inverse[:, :half, :half] = upper_half
    inverse[:, half:, half:] = lower_half
    inverse[:, half:, :half] = (lower_half @ lower[:, half:, :half] @ upper_half).neg_()
    return inverse


def _mine(starts: range) -> list[int]:
    """This rank's slabs: dealt out and back, since each costs less than the one before."""
    world, rank = ranks.world(), ranks.rank()
    return [start for place, start in enumerate(starts) if place % (2 * world) in (rank, 2 * world - 1 - rank)]


def permute_symmetric(matrix: Tensor, order: Tensor) -> Tensor:
    """`matrix[g][order[g]][:, order[g]]` for a stack `(groups, n, n)` and orders `(groups, n)`."""
    found = torch.empty_like(matrix)
    for one, columns, out in zip(matrix, order, found, strict=True):
        # Indexing by both axes at once would, on CUDA, spell out three matrices of int64 indices.
        torch.index_select(one.index_select(0, columns), 1, columns, out=out)
    return found
