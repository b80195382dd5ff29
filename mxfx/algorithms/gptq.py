"""GPTQ for MX formats: rounds a weight so that the layer's output, not the weight, changes least.

Minimises tr((Q - W) H (Q - W)ᵀ) over Q on the grid, column by column (Frantar et al., arXiv 2210.17323), with
the shared scale of each block and row searched while its columns are being compensated, and blocks kept
whole under activation ordering.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from mxfx.algorithms.gptq_solver import Exponents, Order, Solved, solve
from mxfx.formats import FloatElement, Format
from mxfx.ground import ranks


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
        fell_back: the Hessian could not be factorized, or is of zeros; the weight is rounded to nearest.
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
    any_dead = _check(weights, hessian, fmt, damping, order, exponents, refine, targets)
    shared = hessian.ndim == 2
    join = (lambda parts: torch.cat(list(parts))[None]) if shared else (lambda parts: torch.stack(list(parts)))
    dtype = _compute_dtype(weights, fmt)
    weight = join(w.to(dtype) for w in weights)
    goal = weight if targets is None else join(t.to(dtype) for t in targets)
    # What a tensor has once is held for each of its rows.
    units = [(fmt.common(w), len(w)) for w in weights]
    common = None if units[0][0] is None else join(unit.to(dtype).expand(rows) for unit, rows in units)  # type: ignore[union-attr]
    hessian = hessian[None] if shared else hessian
    solved = _solve(weight, goal, hessian, fmt, common, damping, order, exponents, refine, any_dead)
    if not shared:
        return _results([solved.group(index) for index in range(len(weights))])
    bounds = [0, *torch.tensor([len(w) for w in weights]).cumsum(0).tolist()]
    return _results([solved.rows(start, stop) for start, stop in pairwise(bounds)])


def _solve(weight: Tensor, goal: Tensor, hessian: Tensor, fmt: Format, common: Tensor | None, *how: Any) -> Solved:
    """`solve`, each rank a part: of the rows where they share a Hessian, else of the weights."""
    dim = 1 if len(hessian) == 1 else 0
    count = weight.shape[dim]
    if ranks.world() == 1 or count < ranks.world():
        return solve(weight, goal, hessian, fmt, common, *how)
    mine = (slice(None), ranks.share(count)) if dim else (ranks.share(count),)
    own = None if common is None else common[mine]
    with nullcontext() if dim else ranks.alone():
        solved = solve(weight[mine], goal[mine], hessian if dim else hessian[mine], fmt, own, *how)
    return solved.of_all_ranks(dim, count)


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
        lam: λ relative to the mean diagonal of Hq. Of zeros alone any λ gives W: there are no outputs to repeat.

    Returns:
        `(rows, cols)`, float64 for float64 weights, else float32.

    Raises:
        ValueError: shapes that do not fit; Hq + λ I is not positive definite.
    """
    cols = weight.shape[-1]
    if hessian_q.shape != (cols, cols) or cross.shape != (cols, cols):
        raise ValueError(
            f"asymmetric_target: weight {tuple(weight.shape)} needs two ({cols}, {cols}) matrices, got "
            f"{tuple(hessian_q.shape)} and {tuple(cross.shape)}"
        )
    # In place: these are the largest matrices of a run.
    h, w = hessian_q.to(torch.float64, copy=True), weight.double()
    missing = cross.to(torch.float64, copy=True).sub_(h) @ w.mT
    mean = h.diagonal().mean()
    h.diagonal().add_(torch.where(mean == 0, 1.0, lam * mean))
    lower, failed = torch.linalg.cholesky_ex(h)
    if failed:
        known = "raise the ridge, or set asymmetric = 0" if mean.isfinite() else "check the calibration activations"
        raise ValueError(
            f"asymmetric_target: the Hessian cannot be factorized with {lam:g} of its mean diagonal {float(mean):g} "
            f"added; {known}"
        )
    step = torch.cholesky_solve(missing, lower).mT
    del lower
    return (w + alpha * step).to(torch.promote_types(weight.dtype, torch.float32))


def _results(pieces: Sequence[Solved]) -> list[GptqResult]:
    """The results of stacks of one weight each; the device is waited for once."""
    scalars = [
        torch.stack([*(one.sum(dtype=torch.float64) for one in (p.loss, p.rtn_loss, p.dead, p.rtn_rows)), p.damping[0]])
        for p in pieces
    ]
    rows = torch.stack([torch.cat([found, p.failed.double()]) for found, p in zip(scalars, pieces, strict=True)])
    return [
        GptqResult(
            weight=piece.weight[0],
            scales=None if piece.scales is None else piece.scales[0],
            loss=loss,
            rtn_loss=rtn_loss,
            damping_used=damping,
            fell_back=bool(failed),
            dead_columns=int(dead),
            rtn_rows=int(rtn_rows),
        )
        for piece, (loss, rtn_loss, dead, rtn_rows, damping, failed) in zip(pieces, rows.tolist(), strict=True)
    ]


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
) -> bool:
    """Raises ``ValueError`` for what `gptq_batch` does not take; whether a Hessian has a column of zeros."""
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
    tensors = [("Hessian", hessian), *[("weight", w) for w in weights], *[("target", t) for t in targets or []]]
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    # A NaN or an Inf makes the sum one, or a sum overflows: then it is looked for. One wait for the device.
    sums = torch.stack([t.sum(dtype=torch.float64).to(hessian.device) for _, t in tensors])
    *totals, negative, zero = [*sums.tolist(), *torch.stack([(diagonal < 0).any(), (diagonal == 0).any()]).tolist()]
    for (what, tensor), total in zip(tensors, totals, strict=True):
        if not math.isfinite(total) and not bool(tensor.isfinite().all()):
            raise ValueError(f"gptq to {fmt}: a {what} holds NaN or Inf; check the calibration activations")
    if negative:
        raise ValueError("gptq: the Hessian has a negative diagonal, so it is no Gram matrix of activations")
    return bool(zero)
