"""How a kernel walks a tensor: as rows along the last axis, with at most three strided axes before it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

MAX_AXES = 3


@dataclass(frozen=True)
class Rows:
    """A tensor as rows: row `r` starts at element `Σ index_i(r) · strides[i]` over the `sizes` of three axes."""

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


def is_walkable(x: Tensor) -> bool:
    """Whether rows of adjacent elements at no more than three strides describe `x`; else copy it first."""
    return x.is_contiguous() or (x.stride(-1) == 1 and len(_collapse(x.shape, x.stride())) <= MAX_AXES)


def alike(x: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Both as they are, where one walk serves both, else copied."""
    if x.stride() == other.stride() and is_walkable(x):
        return x, other
    return x.contiguous(), other.contiguous()


def as_rows(shape: tuple[int, ...], stride: tuple[int, ...]) -> Rows:
    """The rows of a walkable tensor with at least one axis and one element."""
    axes = _collapse(shape, stride)
    count = 1
    for size, _ in axes:
        count *= size
    sizes, strides = zip(*[(1, 0)] * (MAX_AXES - len(axes)), *axes, strict=True)
    return Rows(shape[-1], count, sizes, strides)


def _collapse(shape: tuple[int, ...], stride: tuple[int, ...]) -> list[tuple[int, int]]:
    """(size, stride) of the leading axes, neighbours merged where one stride steps through both."""
    axes: list[tuple[int, int]] = []
    for size, step in zip(shape[:-1], stride[:-1], strict=True):
        if size == 1:
            continue
        if axes and axes[-1][1] == size * step:
            axes[-1] = (axes[-1][0] * size, step)
        else:
            axes.append((size, step))
    return axes
