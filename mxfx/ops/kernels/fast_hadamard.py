"""Hadamard transforms by the package `fast-hadamard-transform`, where it is installed."""

from __future__ import annotations

from importlib import import_module

from torch import Tensor

from mxfx.ops.kernels import limits


def by_package(x: Tensor, block: int) -> Tensor:
    """`hadamard(x, block)`; `NotImplemented` for what the package does not take.

    Its matrix of a power of two is Sylvester's, as ours; its others are not ours.
    """
    if x.dtype not in limits.DTYPES or not limits.takes_fast_hadamard(block):
        return NotImplemented
    package = import_module("fast_hadamard_transform")
    return package.hadamard_transform(x.contiguous().unflatten(-1, (-1, block)), block**-0.5).flatten(-2)
