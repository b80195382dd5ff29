"""GPTQ for the stacked weights of experts: each with the Hessian of the tokens that it got, many in one batch.

An expert that calibration hardly reached has a Hessian of too low a rank to say which errors matter. It takes that of
all tokens of its layer instead; where those are too few as well, it is rounded to nearest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from mxfx.algorithms.gptq import Exponents, GptqResult, Order, asymmetric_target, gptq_batch
from mxfx.formats import Format

#: What decided the rounding of an expert: the Hessian of its own tokens, that of all tokens, or no Hessian.
Basis = Literal["own", "shared", "nearest"]

#: Bytes that the experts of one batch may take: half of what a device of 80 GB has beside its statistics.
SOLVED_AT_ONCE = {"cuda": 16 << 30, "cpu": 1 << 30}


@dataclass(frozen=True)
class ExpertResult:
    """One expert's rounded weight, and what decided it; its losses are by the Hessian that decided."""

    basis: Basis
    solved: GptqResult


def gptq_experts(
    weight: Tensor,
    hessian: Tensor,
    hits: Sequence[int],
    fmt: Format,
    *,
    fewest: int,
    shared: Tensor | None = None,
    shared_rows: int = 0,
    cross: Tensor | None = None,
    asymmetric: float = 0.0,
    ridge: float = 0.1,
    damping: float = 0.01,
    order: Order = "block",
    exponents: Exponents = "sweep",
    refine: int = 0,
) -> Iterator[ExpertResult]:
    """Rounds the weights of experts one batch after the other, in their order.

    Args:
        weight: `(experts, rows, cols)`.
        hessian: `(experts, cols, cols)`, Gram matrices of what each expert read.
        hits: how many rows each Hessian sums.
        fewest: an expert with fewer hits takes `shared`, the Gram matrix `(cols, cols)` of `shared_rows` rows; where
            there is none, or it has too few rows itself, the expert is rounded to nearest.
        cross: `(experts, cols, cols)`, for targets moved by `asymmetric`; see `asymmetric_target`. Experts that do not
            take their own Hessian keep their weight as target.
        damping, order, exponents, refine: as for `gptq_batch`.

    Raises:
        ValueError: as `gptq_batch`.
    """
    spare = shared if shared is not None and shared_rows >= max(1, fewest) else None
    for part in _batches(weight, refine):
        bases: list[Basis] = [
            "own" if hits[e] >= max(1, fewest) else "nearest" if spare is None else "shared" for e in part
        ]
        stack = hessian[part.start : part.stop].clone()
        for place, basis in enumerate(bases):
            if basis == "shared" and spare is not None:
                stack[place] = spare
            elif basis == "nearest":
                stack[place] = 0
        weights = [weight[e].to(torch.promote_types(weight.dtype, torch.float32)) for e in part]
        targets = None
        if cross is not None and asymmetric:
            targets = [
                asymmetric_target(w, stack[i], cross[e], asymmetric, ridge) if bases[i] == "own" else w
                for i, (w, e) in enumerate(zip(weights, part, strict=True))
            ]
        solved = gptq_batch(
            weights, stack, fmt, damping=damping, order=order, exponents=exponents, refine=refine, targets=targets
        )
        for own, basis, result in zip(weights, bases, solved, strict=True):
            if basis == "nearest":
                # No Hessian, no loss; and no reason to search for another scale than the format's rule takes.
                result = replace(result, weight=fmt.fake_quantize(own), scales=None)
            yield ExpertResult("nearest" if result.fell_back else basis, result)


def _batches(weight: Tensor, refine: int) -> Iterator[range]:
    """Experts whose factors and working copies fit the budget of the device together."""
    experts, rows, cols = weight.shape
    # Factorization: four matrices in float64. Rounding: weight, goal, work, values, their best, and errors.
    each = 32 * cols * cols + (40 + 16 * bool(refine)) * rows * cols
    size = max(1, SOLVED_AT_ONCE.get(weight.device.type, SOLVED_AT_ONCE["cpu"]) // each)
    for start in range(0, experts, size):
        yield range(start, min(start + size, experts))
