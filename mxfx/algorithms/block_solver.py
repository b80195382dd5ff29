"""Rounds the columns of one MX block one after the other, each error fed back into the columns after it.

The shared exponent is searched by doing the whole block once for each candidate and keeping, row by row, the
one with the lowest compensated loss. Scales are powers of two, so the block is first divided by its scale,
exactly, and the loop rounds onto the element's own grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from mxfx.formats import Element, ScaleRule
from mxfx.formats.scale import exponent_from_amax, inverse_power_of_two, largest_magnitude, power_of_two

# Exponents whose power of two and its inverse are both normal float32 numbers.
EXPONENT_LIMIT = 126

# Exponents that a search tries: rceil's, at which nothing saturates, and the two below.
SEARCHED = 3

# The kernel holds a whole block in registers; wider blocks would spill.
_KERNEL_WIDTH = 128


@dataclass(frozen=True)
class BlockSolution:
    """One block rounded; columns lead, rows trail.

    Attributes:
        values: `(groups, b, rows)` on the grid of the chosen exponent.
        residual: `(groups, b, rows)`, compensated column minus its value, to feed to later columns.
        exponents: `(groups, rows)` int32, the candidate kept.
    """

    values: Tensor
    residual: Tensor
    exponents: Tensor


def solve_block(
    columns: Tensor,
    exponents: Tensor | None,
    feedback: Tensor,
    precision: Tensor,
    element: Element,
    out: BlockSolution | None = None,
) -> BlockSolution:
    """Rounds a block under every candidate exponent and keeps the best per row.

    Blocks of up to 128 columns in float32 on CUDA go through one Triton kernel, all others through
    vectorized PyTorch; both compute w_k -= d_j * feedback[j, k] without any division, and differ only by
    the fusing of multiply and add.

    Args:
        columns: `(groups, b, rows)` float32 or float64, with the feedback of all earlier blocks applied.
        exponents: `(groups, candidates, rows)` int32 in [-126, 126]; on equal loss the first one wins. None
            stands for `searched_exponents` of the columns, which the kernel finds by itself.
        feedback: `(groups, b, b)` unit upper triangular (see `HessianFactor`).
        precision: `(groups, b)`.
        element: the grid.
        out: tensors to write into, of any strides but rows side by side; new ones by default.
    """
    if out is None:
        groups, _, rows = columns.shape
        chosen = torch.empty(groups, rows, dtype=torch.int32, device=columns.device)
        out = BlockSolution(torch.empty_like(columns), torch.empty_like(columns), chosen)
    fits_kernel = columns.is_cuda and columns.dtype == torch.float32 and columns.shape[1] <= _KERNEL_WIDTH
    if fits_kernel and _has_triton():
        from mxfx.algorithms.gptq_triton import solve_block_triton

        solve_block_triton(columns, exponents, feedback, precision, element, out.values, out.residual, out.exponents)
        return out
    if exponents is None:
        exponents = searched_exponents(columns, element)
    for g in range(len(columns)):
        found = _solve_one(columns[g], exponents[g], feedback[g], precision[g], element)
        out.values[g], out.residual[g], out.exponents[g] = found.values, found.residual, found.exponents
    return out


def searched_exponents(columns: Tensor, element: Element) -> Tensor:
    """`Format.candidate_exponents` of columns `(groups, b, rows)`: `(groups, 3, rows)` int32 in [-126, 126]."""
    if columns.dtype == torch.float32:
        # The bits of the largest magnitude say the same in a fifth of the operations.
        largest = torch.linalg.vector_norm(columns, ord=torch.inf, dim=1, keepdim=True)
        carry, offset = search_constants(element)
        first = ((largest.view(torch.int32) + carry) >> 23) - offset
    else:
        largest = largest_magnitude(columns.mT.contiguous())
        first = exponent_from_amax(largest, element, ScaleRule.RCEIL)[:, None]
    steps = torch.arange(SEARCHED, dtype=torch.int32, device=columns.device)[:, None]
    return (first - steps).clamp(-EXPONENT_LIMIT, EXPONENT_LIMIT)


def search_constants(element: Element) -> tuple[int, int]:
    """(carry, offset): rceil's exponent is `((bits + carry) >> 23) - offset`, of the largest magnitude's float32 bits.

    The carry reaches the next exponent where the mantissa is above that of the largest element.
    """
    carry = 2**24 - 1 - int(math.frexp(element.max_value)[0] * 2**24)
    return carry, 127 + element.max_exponent


def _solve_one(
    columns: Tensor, exponents: Tensor, feedback: Tensor, precision: Tensor, element: Element
) -> BlockSolution:
    """`solve_block` for one group: shapes as there without the leading axis."""
    b, rows = columns.shape
    work = (columns[:, None] * inverse_power_of_two(exponents, columns.dtype)).reshape(b, -1)
    residual = torch.empty_like(work)
    for j in range(b):
        rounded = element.round(work[j])
        torch.sub(work[j], rounded, out=residual[j])
        work[j] = rounded
        work[j + 1 :].addr_(feedback[j, j + 1 :], residual[j], alpha=-1)

    # Losses in units of the largest candidate, so that squares of tiny or huge scales stay in range.
    relative = power_of_two((2 * (exponents - exponents.amax(0))).clamp(min=-EXPONENT_LIMIT), columns.dtype)
    best = ((precision @ residual.square()).view_as(exponents) * relative).argmin(0, keepdim=True)
    chosen = exponents.gather(0, best)[0]
    scale = power_of_two(chosen, columns.dtype)
    index = best[None].expand(b, 1, rows)
    return BlockSolution(
        work.view(b, -1, rows).gather(1, index)[:, 0] * scale,
        residual.view(b, -1, rows).gather(1, index)[:, 0] * scale,
        chosen,
    )


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
