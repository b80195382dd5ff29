"""A plain linear of few rows on a CPU: a library lays the weight out anew each time, and that takes longest."""

from __future__ import annotations

import torch
from torch import Tensor

from mxfx.ops.kernels.calls import called
from mxfx.ops.kernels.cpu import _C, _few, _taken


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` of one token of few texts, ``(texts, 1, width)``, in bfloat16; sums are float32, as the library's.

    ``NotImplemented`` for what it does not take, and on a CPU without products of bfloat16.
    """
    if x.dtype is not torch.bfloat16 or x.dim() != 3 or not _few(x) or not _taken(x, weight, bias):
        return NotImplemented
    if weight.shape != (weight.shape[0], x.shape[-1]) or (bias is not None and bias.shape != weight.shape[:1]):
        return NotImplemented
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    given = (x.data_ptr(), weight.data_ptr(), None if bias is None else bias.data_ptr(), y.data_ptr())
    sizes = (x.shape[0], x.shape[-1], weight.shape[0], torch.get_num_threads())
    return NotImplemented if called(_C.mxfx_linear, (*given, *sizes), (x, weight, bias), y) else y
