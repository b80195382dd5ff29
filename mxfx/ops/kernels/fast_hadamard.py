"""Hadamard transforms by the package `fast-hadamard-transform`, where it is installed."""

from __future__ import annotations

from importlib import import_module

from torch import Tensor

from mxfx.ops.kernels import takes
from mxfx.ops.kernels.library import kernel
from mxfx.ops.kernels.limits import has_triton

if has_triton():
    import_module("mxfx.ops.kernels.cuda")  # Kernels of ours come first.


@kernel("hadamard", "cuda", takes=takes.fast_hadamard, name="fast-hadamard-transform", library="fast_hadamard")
def by_package(x: Tensor, block: int) -> Tensor:
    """`hadamard(x, block)`.

    The package's matrix of a power of two is Sylvester's, as ours; its others are not ours.
    """
    package = import_module("fast_hadamard_transform")
    return package.hadamard_transform(x.contiguous().unflatten(-1, (-1, block)), block**-0.5).flatten(-2)
