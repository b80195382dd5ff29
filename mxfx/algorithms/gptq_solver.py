"""The solver behind `mxfx.algorithms.gptq`: a stack of weights, column by column, block by block."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mxfx.algorithms.block_solver import BlockSolution, searched_exponents, solve_block
from mxfx.algorithms.gptq_refine import refine_blocks
from mxfx.algorithms.hessian_factor import (
    HessianFactor,
    factorize,
    permute_symmetric,
    revive_dead_columns,
    rounding_order,
)
from mxfx.formats import E8M0, Format, ScaleRule
from mxfx.ground import ranks

Order = Literal["block", "none"]
Exponents = Literal["sweep", "rule"]

# Columns handled together where a format has no blocks of its own.
_UNBLOCKED_WIDTH = 128
#: Columns whose errors reach all later ones by one product: narrower ones would read and write these more often.
PANEL = 128
# Elements of a weight whose rows are rounded together.
_TOGETHER = 1 << 27


@dataclass(frozen=True)
class Solved:
    """A stack of rounded weights `(groups, rows, cols)`, with losses per row `(groups, rows)` in float64."""

    weight: Tensor
    scales: Tensor | None
    loss: Tensor
    rtn_loss: Tensor
    rtn_rows: Tensor
    damping: Tensor
    failed: Tensor
    dead: Tensor

    def rows(self, start: int, stop: int) -> Solved:
        cut = slice(start, stop)
        scales = None if self.scales is None else self.scales[:, cut]
        per_row = (self.loss[:, cut], self.rtn_loss[:, cut], self.rtn_rows[:, cut])
        return Solved(self.weight[:, cut], scales, *per_row, self.damping, self.failed, self.dead)

    @classmethod
    def joined(cls, parts: Sequence[Solved]) -> Solved:
        """All rows of parts that are ranges of rows of the same weights."""
        first = parts[0]
        scales = None if first.scales is None else torch.cat([p.scales for p in parts if p.scales is not None], 1)
        return cls(
            torch.cat([p.weight for p in parts], 1),
            scales,
            torch.cat([p.loss for p in parts], 1),
            torch.cat([p.rtn_loss for p in parts], 1),
            torch.cat([p.rtn_rows for p in parts], 1),
            first.damping,
            first.failed,
            first.dead,
        )

    def of_all_ranks(self, dim: int, count: int) -> Solved:
        """Of the parts that ranks solved: ranges of rows (`dim` 1), or of weights (0), of `count` together."""

        def whole(part: Tensor) -> Tensor:
            return ranks.joined(part, dim, count)

        about = [self.damping, self.failed, self.dead]
        return Solved(
            whole(self.weight),
            None if self.scales is None else whole(self.scales),
            whole(self.loss),
            whole(self.rtn_loss),
            whole(self.rtn_rows),
            *(about if dim else map(whole, about)),
        )

    def group(self, index: int) -> Solved:
        cut = slice(index, index + 1)
        scales = None if self.scales is None else self.scales[cut]
        losses = (self.loss[cut], self.rtn_loss[cut], self.rtn_rows[cut])
        return Solved(self.weight[cut], scales, *losses, self.damping[cut], self.failed[cut], self.dead[cut])


def solve(
    weight: Tensor,
    goal: Tensor,
    hessian: Tensor,
    fmt: Format,
    common: Tensor | None,
    damping: float,
    order: Order,
    exponents: Exponents,
    refine: int,
    any_dead: bool,
) -> Solved:
    """Rounds `(groups, rows, cols)`, one Hessian a group; ranks that meet here have the same Hessians."""
    groups, rows, n = weight.shape
    live, dead = revive_dead_columns(hessian) if any_dead else (hessian, hessian.new_zeros(groups, n, dtype=torch.bool))
    natural = torch.arange(n, device=weight.device).expand(groups, n)
    columns = rounding_order(live, fmt.block) if order == "block" else natural
    factor = factorize(live, columns, damping, weight.dtype, spread=True)
    failed = factor.failed | dead.all(-1)
    solved = []
    for start in range(0, rows, step := rows_at_a_time(rows, n)):
        part = slice(start, start + step)
        own = None if common is None else common[:, part]
        rounded, scales = _round(weight[:, part], goal[:, part], columns, factor, live, fmt, own, exponents, refine)
        solved.append(
            _keep_better_rows(
                weight[:, part], goal[:, part], rounded, scales, hessian, fmt, own, factor.damping, failed, dead
            )
        )
    return solved[0] if len(solved) == 1 else Solved.joined(solved)


def rows_at_a_time(rows: int, columns: int) -> int:
    """Rows of a weight that are rounded together: they do not depend on each other, and all need working copies."""
    return rows if rows * columns <= _TOGETHER else max(1, _TOGETHER // columns)


def _round(
    weight: Tensor,
    goal: Tensor,
    columns: Tensor,
    factor: HessianFactor,
    live: Tensor,
    fmt: Format,
    common: Tensor | None,
    exponents: Exponents,
    refine: int,
) -> tuple[Tensor, Tensor]:
    """Values `(groups, rows, cols)` on the grid, and the scales of blocks, of columns rounded in that order."""
    n = weight.shape[-1]
    width = fmt.block or _UNBLOCKED_WIDTH
    # Columns lead, so that every step of the inner loop works on contiguous rows.
    work = torch.take_along_dim(goal.mT, columns[:, :, None], 1)
    aim = work.clone() if refine else work
    values = torch.empty_like(work)
    panel = max(width, PANEL - PANEL % width)
    residual = work.new_empty(len(work), panel, work.shape[-1])
    kind = torch.int32 if common is None else work.dtype
    shared = torch.empty(len(work), math.ceil(n / width), work.shape[-1], dtype=kind, device=work.device)
    searched = _searches(fmt, exponents)
    for first in range(0, n, panel):
        end = min(first + panel, n)
        for start in range(first, end, width):
            cut = slice(start, min(start + width, end))
            block = work[:, cut]
            candidates = None if searched else candidate_scales(block, fmt, exponents, common)
            here = residual[:, start - first : cut.stop - first]
            out = BlockSolution(values[:, cut], here, shared[:, start // width])
            feedback = factor.feedback[:, cut]
            solve_block(block, candidates, feedback[:, :, cut], factor.precision[:, cut], fmt, common, out)
            if cut.stop < end:
                work[:, cut.stop : end].baddbmm_(feedback[:, :, cut.stop : end].mT, here, alpha=-1)
        if end < n:
            errors = residual[:, : end - first]
            work[:, end:].baddbmm_(factor.feedback[:, first:end, end:].mT, errors, alpha=-1)
    shared = shared.mT
    if refine:
        curvature = permute_symmetric(live, columns).to(weight.dtype)
        curvature.diagonal(dim1=-2, dim2=-1).add_(factor.ridge[:, None].to(weight.dtype))
        values, shared = refine_blocks(
            aim,
            values,
            shared,
            curvature,
            fmt,
            width,
            lambda block: candidate_scales(block, fmt, exponents, common),
            refine,
            common,
        )

    rounded = torch.empty_like(work).scatter_(1, columns[:, :, None].expand_as(work), values).mT.contiguous()
    blocks = torch.div(columns[:, ::width], width, rounding_mode="floor")
    shared = torch.empty_like(shared).scatter_(2, blocks[:, None].expand_as(shared), shared)
    return rounded, shared


def candidate_scales(columns: Tensor, fmt: Format, exponents: Exponents, common: Tensor | None = None) -> Tensor:
    """Scales to try for a block of columns `(groups, b, rows)`: `(groups, candidates, rows)`."""
    if fmt.block is None:
        return torch.zeros_like(columns[:, :1], dtype=torch.int32)
    if _searches(fmt, exponents):
        return searched_exponents(columns, fmt.element)
    blocks, sweep = columns.mT.contiguous(), exponents == "sweep"
    return fmt.scale.candidates(blocks, fmt.element, common, sweep).movedim(0, 1)


def _searches(fmt: Format, exponents: Exponents) -> bool:
    """Whether the candidates are those that `solve_block` finds by itself."""
    powers = fmt.block is not None and isinstance(fmt.scale, E8M0)
    return powers and exponents == "sweep" and fmt.rule is not ScaleRule.CEIL


def _keep_better_rows(
    weight: Tensor,
    goal: Tensor,
    rounded: Tensor,
    shared: Tensor,
    hessian: Tensor,
    fmt: Format,
    common: Tensor | None,
    damping: Tensor,
    failed: Tensor,
    dead: Tensor,
) -> Solved:
    """Takes rounding to nearest for the rows where it is better, and everywhere that there is no Hessian to go by."""
    of_block = None if common is None else common[:, :, None]
    nearest = fmt.fake_quantize(weight, common=of_block)
    curvature = hessian.to(weight.dtype)
    loss = _row_losses(rounded - goal, curvature)
    rtn_loss = _row_losses(nearest - goal, curvature)
    # Written so that a NaN loss loses.
    use_nearest = ~(loss <= rtn_loss) | failed[:, None]
    scales = None
    if fmt.block is not None:
        padded = torch.nn.functional.pad(weight, (0, -weight.shape[-1] % fmt.block))
        own = fmt.choose(padded.unflatten(-1, (-1, fmt.block)), of_block)
        scales = torch.where(use_nearest[:, :, None], own, shared)
    return Solved(
        weight=torch.where(use_nearest[:, :, None], nearest, rounded),
        scales=scales,
        loss=torch.where(use_nearest, rtn_loss, loss),
        rtn_loss=rtn_loss,
        rtn_rows=use_nearest,
        damping=damping,
        failed=failed,
        dead=dead,
    )


def _row_losses(error: Tensor, hessian: Tensor) -> Tensor:
    """e H eᵀ of each row, `(groups, rows)` float64.

    On CUDA by TF32: of a sum over thousands of columns its 11 bits a factor change the fifth digit, in an eighth of
    the time.
    """
    with _tf32(error.is_cuda):
        product = torch.matmul(error, hessian)
    return (product * error).sum(-1, dtype=torch.float64)


@contextmanager
def _tf32(wanted: bool) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    if wanted:
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        if wanted:
            torch.set_float32_matmul_precision(before)
