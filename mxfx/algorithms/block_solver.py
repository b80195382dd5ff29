"""Rounds the columns of one MX block one after the other, each error fed back into the columns after it.

The shared scale is searched by doing the whole block once for each candidate and keeping, row by row, the one with
the lowest compensated loss. The block is first divided by its step (exactly, where that is a power of two), and the
loop rounds onto the element's own grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from mxfx.formats import E8M0, Element, Format
from mxfx.formats.e8m0 import SEARCH_LIMIT, SEARCHED

# The kernel holds a whole block in registers; wider blocks would spill.
_KERNEL_WIDTH = 128


@dataclass(frozen=True)
class BlockSolution:
    """One block rounded; columns lead, rows trail.

    Attributes:
        values: `(groups, b, rows)` on the grid of the chosen scale.
        residual: `(groups, b, rows)`, compensated column minus its value, to feed to later columns.
        scales: `(groups, rows)`, the candidate kept (see `Format.choose`).
    """

    values: Tensor
    residual: Tensor
    scales: Tensor


def solve_block(
    columns: Tensor,
    scales: Tensor | None,
    feedback: Tensor,
    precision: Tensor,
    fmt: Format,
    common: Tensor | None = None,
    out: BlockSolution | None = None,
) -> BlockSolution:
    """Rounds a block under every candidate scale and keeps the best per row.

    Blocks of up to 128 columns in float32 on CUDA with scales of powers of two go through one Triton kernel, all others
    through vectorized PyTorch; both compute w_k -= d_j * feedback[j, k] without any division, and differ only by
    the fusing of multiply and add.

    Args:
        columns: `(groups, b, rows)` float32 or float64, with the feedback of all earlier blocks applied.
        scales: `(groups, candidates, rows)` as `Scale.candidates` gives; on equal loss the first one wins. None stands
            for those of `Scale.candidates` without `ceil`'s, which the kernel finds by itself.
        feedback: `(groups, b, b)` unit upper triangular (see `HessianFactor`).
        precision: `(groups, b)`.
        fmt: the grid.
        common: `(groups, rows)`, see `Format.common`; None where the format has no such thing.
        out: tensors to write into, of any strides but rows side by side; new ones by default.
    """
    if out is None:
        groups, _, rows = columns.shape
        kind = columns.dtype if common is not None else torch.int32
        chosen = torch.empty(groups, rows, dtype=kind, device=columns.device)
        out = BlockSolution(torch.empty_like(columns), torch.empty_like(columns), chosen)
    exponents = isinstance(fmt.scale, E8M0) and fmt.rounding == "rn"
    fits_kernel = columns.is_cuda and columns.dtype == torch.float32 and columns.shape[1] <= _KERNEL_WIDTH
    if exponents and fits_kernel and _has_triton():
        from mxfx.algorithms.gptq_triton import solve_block_triton

        solve_block_triton(columns, scales, feedback, precision, fmt.element, out.values, out.residual, out.scales)
        return out
    if scales is None:
        scales = searched_exponents(columns, fmt.element)
    for g in range(len(columns)):
        own = None if common is None else common[g]
        found = _solve_one(columns[g], scales[g], feedback[g], precision[g], fmt, own)
        out.values[g], out.residual[g], out.scales[g] = found.values, found.residual, found.scales
    return out


def searched_exponents(columns: Tensor, element: Element) -> Tensor:
    """The three candidates of `E8M0` for columns `(groups, b, rows)`: `(groups, 3, rows)` int32 in [-126, 126]."""
    if columns.dtype != torch.float32:
        return E8M0().candidates(columns.mT.contiguous(), element, None, sweep=True).movedim(0, 1)
    # The bits of the largest magnitude say the same in a fifth of the operations.
    largest = torch.linalg.vector_norm(columns, ord=torch.inf, dim=1, keepdim=True)
    carry, offset = search_constants(element)
    first = ((largest.view(torch.int32) + carry) >> 23) - offset
    steps = torch.arange(SEARCHED, dtype=torch.int32, device=columns.device)[:, None]
    return (first - steps).clamp(-SEARCH_LIMIT, SEARCH_LIMIT)


def search_constants(element: Element) -> tuple[int, int]:
    """(carry, offset): rceil's exponent is `((bits + carry) >> 23) - offset`, of the largest magnitude's float32 bits.

    The carry reaches the next exponent where the mantissa is above that of the largest element.
    """
    carry = 2**24 - 1 - int(math.frexp(element.max_value)[0] * 2**24)
    return carry, 127 + element.max_exponent


def _solve_one(
    columns: Tensor, scales: Tensor, feedback: Tensor, precision: Tensor, fmt: Format, common: Tensor | None
) -> BlockSolution:
    """`solve_block` for one group: shapes as there without the leading axis."""
    b, rows = columns.shape
    step, inverse = fmt.scale.steps(scales, common, columns.dtype)
    work = (columns[:, None] * inverse).reshape(b, -1)
    residual = torch.empty_like(work)
    for j in range(b):
        rounded = fmt.element.round(work[j])
        torch.sub(work[j], rounded, out=residual[j])
        work[j] = rounded
        work[j + 1 :].addr_(feedback[j, j + 1 :], residual[j], alpha=-1)

    # Losses in units of the largest candidate, so that squares of tiny or huge steps stay in range.
    relative = (step / step.amax(0)).square().clamp_min(2.0**-SEARCH_LIMIT)
    best = ((precision @ residual.square()).view_as(scales) * relative).argmin(0, keepdim=True)
    kept = step.gather(0, best)[0]
    index = best[None].expand(b, 1, rows)
    return BlockSolution(
        work.view(b, -1, rows).gather(1, index)[:, 0] * kept,
        residual.view(b, -1, rows).gather(1, index)[:, 0] * kept,
        scales.gather(0, best)[0],
    )


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
