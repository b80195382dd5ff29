"""Lowers the loss of a rounded weight further, block by block, with all other blocks held fixed.

GPTQ decides each column knowing only the errors made before it. Given all other codes, the loss in one block
B is a quadratic around the optimum t = W_B - c H_BB⁻¹, where c is the gradient that the errors of the other
blocks exert on B; so the block is solved again around t, scales included, and the result taken row by row
where it is better. Sweeps over all blocks never raise the (damped) loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mxfx.algorithms.block_solver import solve_block
from mxfx.algorithms.hessian_factor import factorize
from mxfx.formats import Format


def refine_blocks(
    aim: Tensor,
    values: Tensor,
    scales: Tensor,
    hessian: Tensor,
    fmt: Format,
    width: int,
    candidates: Callable[[Tensor], Tensor],
    sweeps: int,
    common: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Re-optimises the codes and scales of each block in turn.

    Args:
        aim: `(groups, n, rows)`, the columns to approximate, in rounding order.
        values: `(groups, n, rows)` on the grid.
        scales: `(groups, rows, blocks)`, as `Format.choose` gives.
        hessian: `(groups, n, n)` positive definite, in rounding order.
        width: columns in a block.
        candidates: scales to try for a block `(groups, b, rows)`, as `(groups, candidates, rows)`.
        sweeps: passes over all blocks.
        common: `(groups, rows)`, see `Format.common`.

    Returns:
        New values and scales, shaped as given.
    """
    n = aim.shape[1]
    values, scales, error = values.clone(), scales.clone(), values - aim
    blocks = [slice(start, min(start + width, n)) for start in range(0, n, width)]
    systems = _block_systems(hessian, blocks)
    for _ in range(sweeps):
        for index, (cut, system) in enumerate(zip(blocks, systems, strict=True)):
            local = hessian[:, cut, cut]
            own = torch.bmm(local, error[:, cut])
            others = torch.bmm(hessian[:, cut], error) - own
            optimum = aim[:, cut] - torch.bmm(system.inverse, others)
            found = solve_block(optimum, candidates(optimum), system.feedback, system.precision, fmt, common)
            better = _losses(found.values - optimum, local) < _losses(values[:, cut] - optimum, local)
            values[:, cut] = torch.where(better[:, None], found.values, values[:, cut])
            scales[:, :, index] = torch.where(better, found.scales, scales[:, :, index])
            error[:, cut] = values[:, cut] - aim[:, cut]
    return values, scales


@dataclass(frozen=True)
class _BlockSystem:
    """What solving one block around its optimum needs: H_BB⁻¹ and the factors of H_BB, per group."""

    inverse: Tensor
    feedback: Tensor
    precision: Tensor


def _block_systems(hessian: Tensor, blocks: list[slice]) -> list[_BlockSystem]:
    """All blocks of one width are factorized in one batch; a ragged last block makes a second one."""
    groups = len(hessian)
    systems: list[_BlockSystem] = []
    for width in dict.fromkeys(cut.stop - cut.start for cut in blocks):
        cuts = [cut for cut in blocks if cut.stop - cut.start == width]
        local = torch.cat([hessian[:, cut, cut] for cut in cuts])
        order = torch.arange(width, device=local.device).expand(len(local), width)
        factor = factorize(local, order, 0.0, local.dtype)
        inverse = torch.linalg.inv(local.double()).to(local.dtype)
        parts = (inverse.split(groups), factor.feedback.split(groups), factor.precision.split(groups))
        systems.extend(_BlockSystem(*part) for part in zip(*parts, strict=True))
    return systems


def _losses(error: Tensor, local: Tensor) -> Tensor:
    """eᵀ H_BB e of each row, `(groups, rows)`, for errors `(groups, b, rows)`."""
    return (torch.bmm(local, error) * error).sum(1)
