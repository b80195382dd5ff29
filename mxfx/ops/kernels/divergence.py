"""Rows of logits on a CPU by a C kernel: one reading of each where ATen's ops go through memory a dozen times."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mxfx.ops.kernels.build import library
from mxfx.ops.kernels.structs import DTYPES


@dataclass(frozen=True)
class LogitRows:
    """What is known of rows of logits, ``(rows,)`` each; None for what was not asked.

    ``top`` is the likeliest token, ``loglikelihood`` that of the targets; ``kl``, KL(expected ‖ actual) in nats, and
    ``expected_top`` compare with other logits; ``gradient`` ``(rows, vocabulary)`` is that of the mean of ``kl``.
    """

    top: Tensor
    loglikelihood: Tensor | None
    kl: Tensor | None
    expected_top: Tensor | None
    gradient: Tensor | None


def logit_rows(
    actual: Tensor, expected: Tensor | None = None, *, targets: Tensor | None = None, gradient: bool = False
) -> LogitRows | None:
    """Rows of logits ``(rows, vocabulary)``, of int64 ``targets`` ``(rows,)``, and how far they are from ``expected``.

    Results are float32, of sums in float64. None where no kernel takes them: on other devices, without a C compiler,
    for logits of other dtypes or that are not finite.
    """
    kernels = library()
    logits = [t for t in (actual, expected) if t is not None]
    fit = all(t.device.type == "cpu" and t.dtype is actual.dtype and t.is_contiguous() for t in logits)
    if isinstance(kernels, str) or not fit or actual.dtype not in DTYPES or actual.dim() != 2 or not actual.numel():
        return None
    count, width = actual.shape
    if targets is not None:
        targets = targets.to(torch.int64).contiguous()
        if targets.shape != (count,) or bool(((targets < 0) | (targets >= width)).any()):
            raise ValueError(f"targets {tuple(targets.shape)} do not name a token of each of {count} rows of {width}")
    if expected is not None and expected.shape != actual.shape:
        raise ValueError(f"logits {tuple(actual.shape)} cannot be compared with {tuple(expected.shape)}")
    top = torch.empty(count, dtype=torch.int32)
    log_p = None if targets is None else torch.empty(count)
    kl, expected_top = (None, None) if expected is None else (torch.empty(count), torch.empty_like(top))
    slope = torch.empty_like(actual) if gradient and expected is not None else None
    tensors = (actual, expected, targets, log_p, top, kl, expected_top, slope)
    places = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
    threads, narrow = torch.get_num_threads(), actual.dtype is torch.bfloat16
    failed = kernels.mxfx_divergence(*places, count, width, narrow, 1 / count, threads)
    if failed == 2:
        raise MemoryError("no memory for a row of logits")
    return None if failed else LogitRows(top, log_p, kl, expected_top, slope)
