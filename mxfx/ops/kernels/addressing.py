"""How a kernel walks a tensor: as rows along the last axis, with at most three strided axes before it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """A tensor as rows: row `r` starts at element `Σ index_i(r) · strides[i]` over the `sizes` of three axes."""

    tensor: Tensor
    length: int
    count: int
    sizes: tuple[int, int, int]
    strides: tuple[int, int, int]

    @property
    def flat(self) -> bool:
        """Whether each row begins where the one before it ends."""
        return self.count <= 1 or (self.sizes[:2] == (1, 1) and self.strides[2] == self.length)

    @property
    def arguments(self) -> tuple[int, ...]:
        """What the kernels' `row_offset` takes; sizes of 1 spare it the divisions."""
        return (1, 1, self.length, 0, 0) if self.flat else (*self.sizes[1:], *self.strides)


def as_rows(x: Tensor) -> Rows:
    """`x`, any shape with at least one axis, as rows; copied only where three strides do not describe it."""
    axes = _collapse(x)
    if x.stride(-1) != 1 or len(axes) > 3:
        x = x.contiguous()
        axes = _collapse(x)
    axes = [(1, 0)] * (3 - len(axes)) + axes
    length = x.shape[-1]
    sizes, strides = zip(*axes, strict=True)
    return Rows(x, length, x.numel() // max(length, 1), sizes, strides)


def _collapse(x: Tensor) -> list[tuple[int, int]]:
    """(size, stride) of the leading axes, neighbours merged where one stride steps through both."""
    axes: list[tuple[int, int]] = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if axes and axes[-1][1] == size * stride:
            axes[-1] = (axes[-1][0] * size, stride)
        else:
            axes.append((size, stride))
    return axes


def on_device_of(x: Tensor) -> AbstractContextManager:
    """Kernels launch on the current device, which need not be the tensor's."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def multiprocessors(x: Tensor) -> int:
    """Streaming multiprocessors of the tensor's device; 1 where it has none."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
