"""GPTQ for MX formats: rounds a weight so that the layer's output, not the weight, changes least.

Minimises tr((Q - W) H (Q - W)ᵀ) over Q on the grid, column by column (Frantar et al., arXiv 2210.17323), with
the shared scale of each block and row searched while its columns are being compensated, and blocks kept
whole under activation ordering.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from mxfx.algorithms.block_solver import BlockSolution, searched_exponents, solve_block
from mxfx.algorithms.gptq_refine import refine_blocks
from mxfx.algorithms.hessian_factor import factorize, permute_symmetric, revive_dead_columns, rounding_order
from mxfx.formats import E8M0, FloatElement, Format, ScaleRule

Order = Literal["block", "none"]
Exponents = Literal["sweep", "rule"]

# Columns handled together where a format has no blocks of its own.
_UNBLOCKED_WIDTH = 128


@dataclass(frozen=True)
class GptqResult:
    """A rounded weight and how it got there.

    Attributes:
        weight: `(rows, cols)` on the format's grid; float64 for float64 weights, else float32.
        scales: `(rows, blocks)`, the scale that each block was rounded with (E8M0: int32 exponents); None for a format
            without blocks. Packing MX formats needs only the weight: the rule `mse` encodes it without loss, whichever
            exponent was searched. Other rules may not: MXINT's lowest code alone makes `floor` and `ceil` pick a wider
            scale. Nor does NVFP4, whose scales do not follow from the rounded weight.
        loss: tr((Q - W) H (Q - W)ᵀ) with the undamped H; never above `rtn_loss`.
        rtn_loss: the same for rounding to nearest.
        damping_used: relative damping that the factorization took.
        fell_back: the Hessian could not be factorized; the weight is rounded to nearest.
        dead_columns: columns that H never saw; rounded to nearest.
        rtn_rows: rows for which rounding to nearest was better and was kept.
    """

    weight: Tensor
    scales: Tensor | None
    loss: float
    rtn_loss: float
    damping_used: float
    fell_back: bool
    dead_columns: int
    rtn_rows: int


def gptq_batch(
    weights: Sequence[Tensor],
    hessian: Tensor,
    fmt: Format,
    *,
    damping: float = 0.01,
    order: Order = "block",
    exponents: Exponents = "sweep",
    refine: int = 0,
    targets: Sequence[Tensor] | None = None,
) -> list[GptqResult]:
    """Rounds several weights in one go: linears that share an input, or linears of one shape.

    Args:
        weights: each `(rows_i, cols)`, any float dtype; computed in float32 or better.
        hessian: `(cols, cols)`: one for all weights, factorized once; or `(len(weights), cols, cols)`: one
            each, all weights of equal shape. Gram matrix of the inputs that the GEMM sees, any scale.
        fmt: the grid; blocks along the columns, the last one may be ragged.
        damping: added to the diagonal relative to its mean; ten times more, up to three times, where the
            Cholesky factorization fails, then rounding to nearest.
        order: "block" rounds blocks by falling Hessian mass and columns inside them by falling diagonal;
            "none" rounds left to right.
        exponents: "sweep" runs each block once per candidate exponent and keeps the lowest compensated loss
            per row; "rule" takes the format's rule, on the compensated columns.
        refine: sweeps of block-wise re-optimisation afterwards (see `gptq_refine`); each lowers the loss.
        targets: what to approximate instead of the weights themselves, such as `asymmetric_target`'s; the
            loss is then measured against them, and rounding to nearest still means that of the weight.

    Raises:
        ValueError: shapes that do not fit; NaN or Inf in a weight, target or Hessian; a negative diagonal;
            an unknown option.
    """
    _check(weights, hessian, fmt, damping, order, exponents, refine, targets)
    shared = hessian.ndim == 2
    join = (lambda parts: torch.cat(list(parts))[None]) if shared else (lambda parts: torch.stack(list(parts)))
    dtype = _compute_dtype(weights, fmt)
    weight = join(w.to(dtype) for w in weights)
    goal = weight if targets is None else join(t.to(dtype) for t in targets)
    # What a tensor has once is held for each of its rows.
    units = [(fmt.common(w), len(w)) for w in weights]
    common = None if units[0][0] is None else join(unit.to(dtype).expand(rows) for unit, rows in units)  # type: ignore[union-attr]
    solved = _solve(weight, goal, hessian[None] if shared else hessian, fmt, common, damping, order, exponents, refine)
    pieces = [solved]
    if shared:
        bounds = [0, *torch.tensor([len(w) for w in weights]).cumsum(0).tolist()]
        pieces = [solved.rows(start, stop) for start, stop in pairwise(bounds)]
        return [piece.result(0) for piece in pieces]
    return [solved.result(group) for group in range(len(weights))]


def asymmetric_target(
    weight: Tensor, hessian_q: Tensor, cross: Tensor, alpha: float = 0.25, lam: float = 0.1
) -> Tensor:
    """The weight that, on quantized inputs Xq, best repeats W's outputs on the float inputs X.

    min ‖X Wᵀ - Xq Qᵀ‖² is GPTQ with Hq = Xqᵀ Xq around the least-squares weight (GPTAQ, arXiv 2504.02692;
    Qronos, arXiv 2505.11695)

        W* = W + ((Hq + λ I)⁻¹ (Xqᵀ X - Hq) Wᵀ)ᵀ,

    of which only the part alpha is taken: full strength overfits the calibration data.

    Args:
        weight: `(rows, cols)`.
        hessian_q: `(cols, cols)`, Xqᵀ Xq.
        cross: `(cols, cols)`, Xqᵀ X, same scale; row = quantized channel.
        alpha: 0 gives W, 1 gives W*.
        lam: λ relative to the mean diagonal of Hq.

    Returns:
        `(rows, cols)`, float64 for float64 weights, else float32.

    Raises:
        ValueError: shapes that do not fit.
        torch.linalg.LinAlgError: Hq + λ I is not positive definite; raise `lam`.
    """
    cols = weight.shape[-1]
    if hessian_q.shape != (cols, cols) or cross.shape != (cols, cols):
        raise ValueError(
            f"asymmetric_target: weight {tuple(weight.shape)} needs two ({cols}, {cols}) matrices, got "
            f"{tuple(hessian_q.shape)} and {tuple(cross.shape)}"
        )
    h, w = hessian_q.double(), weight.double()
    ridge = lam * h.diagonal().mean() * torch.eye(cols, dtype=torch.float64, device=h.device)
    step = torch.cholesky_solve((cross.double() - h) @ w.mT, torch.linalg.cholesky(h + ridge)).mT
    return (w + alpha * step).to(torch.promote_types(weight.dtype, torch.float32))


@dataclass(frozen=True)
class _Solved:
    """A stack of rounded weights `(groups, rows, cols)`, with losses per row `(groups, rows)` in float64."""

    weight: Tensor
    scales: Tensor | None
    loss: Tensor
    rtn_loss: Tensor
    rtn_rows: Tensor
    damping: Tensor
    failed: Tensor
    dead: Tensor

    def rows(self, start: int, stop: int) -> _Solved:
        cut = slice(start, stop)
        scales = None if self.scales is None else self.scales[:, cut]
        per_row = (self.loss[:, cut], self.rtn_loss[:, cut], self.rtn_rows[:, cut])
        return _Solved(self.weight[:, cut], scales, *per_row, self.damping, self.failed, self.dead)

    def result(self, group: int) -> GptqResult:
        sums = (self.loss, self.rtn_loss, self.dead, self.rtn_rows)
        scalars = [*(one[group].sum(dtype=torch.float64) for one in sums), self.damping[group], self.failed[group]]
        # One wait for the device instead of six.
        loss, rtn_loss, dead, rtn_rows, damping, failed = torch.stack([one.double() for one in scalars]).tolist()
        return GptqResult(
            weight=self.weight[group],
            scales=None if self.scales is None else self.scales[group],
            loss=loss,
            rtn_loss=rtn_loss,
            damping_used=damping,
            fell_back=bool(failed),
            dead_columns=int(dead),
            rtn_rows=int(rtn_rows),
        )


def _solve(
    weight: Tensor,
    goal: Tensor,
    hessian: Tensor,
    fmt: Format,
    common: Tensor | None,
    damping: float,
    order: Order,
    exponents: Exponents,
    refine: int,
) -> _Solved:
    """Rounds `(groups, rows, cols)`, one Hessian a group."""
    groups, _, n = weight.shape
    live, dead = revive_dead_columns(hessian)
    natural = torch.arange(n, device=weight.device).expand(groups, n)
    columns = rounding_order(live, fmt.block) if order == "block" else natural
    factor = factorize(live, columns, damping, weight.dtype)

    width = fmt.block or _UNBLOCKED_WIDTH
    # Columns lead, so that every step of the inner loop works on contiguous rows.
    work = torch.take_along_dim(goal.mT, columns[:, :, None], 1)
    aim = work.clone() if refine else work
    values = torch.empty_like(work)
    residual = work.new_empty(groups, width, work.shape[-1])
    kind = torch.int32 if common is None else work.dtype
    shared = torch.empty(groups, math.ceil(n / width), work.shape[-1], dtype=kind, device=work.device)
    searched = _searches(fmt, exponents)
    for index, start in enumerate(range(0, n, width)):
        cut = slice(start, min(start + width, n))
        block = work[:, cut]
        candidates = None if searched else candidate_scales(block, fmt, exponents, common)
        out = BlockSolution(values[:, cut], residual[:, : cut.stop - start], shared[:, index])
        feedback = factor.feedback[:, cut]
        solve_block(block, candidates, feedback[:, :, cut], factor.precision[:, cut], fmt, common, out)
        work[:, cut.stop :].baddbmm_(feedback[:, :, cut.stop :].mT, out.residual, alpha=-1)
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
    return _keep_better_rows(weight, goal, rounded, shared, hessian, fmt, common, factor.damping, factor.failed, dead)


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
) -> _Solved:
    """Takes rounding to nearest for the rows where it is better, and everywhere the factorization failed."""
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
    return _Solved(
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
    """e H eᵀ of each row, `(groups, rows)` float64."""
    return (torch.matmul(error, hessian) * error).sum(-1, dtype=torch.float64)


def _compute_dtype(weights: Sequence[Tensor], fmt: Format) -> torch.dtype:
    # A float32 has no room to round an element of 8 exponent bits.
    wide = isinstance(fmt.element, FloatElement) and fmt.element.exponent_bits == 8
    return torch.float64 if wide or weights[0].dtype == torch.float64 else torch.float32


def _check(
    weights: Sequence[Tensor],
    hessian: Tensor,
    fmt: Format,
    damping: float,
    order: str,
    exponents: str,
    refine: int,
    targets: Sequence[Tensor] | None,
) -> None:
    if order not in ("block", "none") or exponents not in ("sweep", "rule"):
        raise ValueError(
            f"gptq: order is 'block' or 'none' and exponents 'sweep' or 'rule'; got {order!r}, {exponents!r}"
        )
    if damping < 0 or refine < 0:
        raise ValueError(f"gptq: damping and refine must not be negative, got {damping} and {refine}")
    shapes = [tuple(w.shape) for w in weights]
    n = hessian.shape[-1]
    own = hessian.ndim == 3
    if not shapes or any(len(shape) != 2 or shape[1] != n for shape in shapes):
        raise ValueError(f"gptq: weights must be (rows, {n}) for a Hessian {tuple(hessian.shape)}, got {shapes}")
    if hessian.shape != ((len(weights), n, n) if own else (n, n)) or (own and len(set(shapes)) > 1):
        raise ValueError(
            f"gptq: the Hessian must be (cols, cols), or ({len(weights)}, cols, cols) for weights of one "
            f"shape; got {tuple(hessian.shape)} for weights {shapes}"
        )
    if targets is not None and [tuple(t.shape) for t in targets] != shapes:
        raise ValueError(f"gptq: targets {[tuple(t.shape) for t in targets]} do not match weights {shapes}")
    tensors = {"Hessian": [hessian], "weight": weights, "target": targets or []}
    for what, group in tensors.items():
        if not all(bool(t.isfinite().all()) for t in group):
            raise ValueError(f"gptq to {fmt}: a {what} holds NaN or Inf; check the calibration activations")
    if bool((hessian.diagonal(dim1=-2, dim2=-1) < 0).any()):
        raise ValueError("gptq: the Hessian has a negative diagonal, so it is no Gram matrix of activations")
