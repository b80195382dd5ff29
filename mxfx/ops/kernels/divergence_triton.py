"""KL of two next-token distributions and its gradient, in two readings of the logits.

Importable only where `triton` is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxfx.algorithms.launch import on_device_of

#: Columns that a program holds at a time.
COLUMNS = 4096


def divergence_triton(actual: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    """KL(softmax(expected) ‖ softmax(actual)) of each row, and its gradient to `actual`.

    Both are (rows, vocabulary), contiguous. Returns float32 (rows,) and, in the dtype of `actual`, the gradient of the
    mean over rows.
    """
    rows, columns = actual.shape
    found = torch.empty(rows, dtype=torch.float32, device=actual.device)
    gradient = torch.empty_like(actual)
    width = min(COLUMNS, triton.next_power_of_2(columns))
    with on_device_of(actual):
        _divergence_kernel[(rows,)](actual, expected, gradient, found, columns, 1.0 / rows, WIDTH=width, num_warps=8)
    return found, gradient


@triton.jit
def _divergence_kernel(actual_ptr, expected_ptr, gradient_ptr, found_ptr, columns, share, WIDTH: tl.constexpr):
    """One program a row: the two normalizers by running maxima (arXiv 1805.02867), then what follows."""
    row = tl.program_id(0).to(tl.int64)
    actual_ptr += row * columns
    expected_ptr += row * columns
    gradient_ptr += row * columns
    lane = tl.arange(0, WIDTH)
    most_a, most_e = -float("inf"), -float("inf")
    sum_a, sum_e = 0.0, 0.0
    for start in range(0, columns, WIDTH):
        inside = start + lane < columns
        a = tl.load(actual_ptr + start + lane, mask=inside, other=-float("inf")).to(tl.float32)
        e = tl.load(expected_ptr + start + lane, mask=inside, other=-float("inf")).to(tl.float32)
        next_a, next_e = tl.maximum(most_a, tl.max(a, 0)), tl.maximum(most_e, tl.max(e, 0))
        sum_a = sum_a * tl.exp(most_a - next_a) + tl.sum(tl.exp(a - next_a), 0)
        sum_e = sum_e * tl.exp(most_e - next_e) + tl.sum(tl.exp(e - next_e), 0)
        most_a, most_e = next_a, next_e
    whole_a, whole_e = most_a + tl.log(sum_a), most_e + tl.log(sum_e)
    found = tl.zeros((WIDTH,), dtype=tl.float32)
    for start in range(0, columns, WIDTH):
        inside = start + lane < columns
        a = tl.load(actual_ptr + start + lane, mask=inside, other=0.0).to(tl.float32) - whole_a
        e = tl.load(expected_ptr + start + lane, mask=inside, other=0.0).to(tl.float32) - whole_e
        p = tl.exp(e)
        found += tl.where(inside & (p > 0), p * (e - a), 0.0)
        tl.store(
            gradient_ptr + start + lane,
            ((tl.exp(a) - p) * share).to(gradient_ptr.dtype.element_ty),
            mask=inside,
        )
    tl.store(found_ptr + row, tl.sum(found, 0))
