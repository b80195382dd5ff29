"""GPTQ of one weight, as most tests want it."""

from __future__ import annotations

from torch import Tensor

from mxfx.algorithms.gptq import GptqResult, gptq_batch
from mxfx.formats import Format


def gptq(
    weight: Tensor, hessian: Tensor, fmt: Format, *, target: Tensor | None = None, **options: object
) -> GptqResult:
    """`gptq_batch` on `weight`, `(rows, cols)`, and its `target`."""
    targets = None if target is None else [target]
    return gptq_batch([weight], hessian, fmt, targets=targets, **options)[0]  # type: ignore[arg-type]
