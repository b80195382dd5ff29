"""The ops on a CUDA device, each registered above its function with what it takes; the definition takes the rest.

Where a device has too little shared memory for a tile, a warning says so, once, and the definition runs.

Importable only where `triton` is.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache, wraps

from torch import Tensor
from triton.runtime.errors import OutOfResources

from mxfx.algorithms.hadamard import DENSE_ORDER
from mxfx.formats import Format, parse
from mxfx.ops.kernels import takes
from mxfx.ops.kernels.kronecker_triton import kronecker_triton
from mxfx.ops.kernels.library import kernel, signs_of
from mxfx.ops.kernels.norm_triton import norm_triton, row_scales
from mxfx.ops.kernels.quantize_triton import fake_quantize_triton
from mxfx.ops.kernels.transform_triton import transform_triton


@lru_cache(maxsize=256)
def _format(text: str) -> Format:
    return parse(text)


def if_it_fits(kernel: Callable) -> Callable:
    """A kernel that gives `NotImplemented`, with a warning, where the device has too little shared memory for it."""

    @wraps(kernel)
    def call(*args, **kwargs):
        try:
            return kernel(*args, **kwargs)
        except OutOfResources as error:
            warnings.warn(
                f"mxfx_kernels::{kernel.__name__} runs its definition, which is slower: on this device a program may "
                f"have {error.limit} bytes of {error.name}, and the kernel needs {error.required}",
                RuntimeWarning,
                stacklevel=2,
            )
            return NotImplemented

    return call


@kernel("fake_quantize", "cuda", takes=takes.fake_quantize, name="triton-fake-quantize")
def fake_quantize(x: Tensor, format: str, axis: int = -1) -> Tensor:
    fmt = _format(format)
    if axis in (-1, x.dim() - 1) or fmt.block is None:
        return fake_quantize_triton(x, fmt)
    return fake_quantize_triton(x.movedim(axis, -1), fmt).movedim(-1, axis).contiguous()


@kernel("block_transform", "cuda", takes=takes.block_transform, name="triton-block-transform")
@if_it_fits
def block_transform(x: Tensor, matrix: Tensor) -> Tensor:
    return transform_triton(x, matrix)


@kernel("hadamard", "cuda", takes=takes.hadamard, name="triton-hadamard")
@if_it_fits
def hadamard(x: Tensor, block: int) -> Tensor:
    if block > DENSE_ORDER:
        return kronecker_triton(x, block, None)
    return transform_triton(x, signs_of(block, x.device), signs=True)


@kernel("hadamard_quantize", "cuda", takes=takes.hadamard_quantize, name="triton-hadamard-quantize")
@if_it_fits
def hadamard_quantize(x: Tensor, block: int, format: str) -> Tensor:
    return kronecker_triton(x, block, _format(format))


@kernel("transform_quantize", "cuda", takes=takes.transform_quantize, name="triton-transform-quantize")
@if_it_fits
def transform_quantize(x: Tensor, matrix: Tensor | None, format: str, hadamard: bool = False) -> Tensor:
    return transform_triton(x, matrix, hadamard, _format(format))


@kernel("norm_quantize", "cuda", takes=takes.norm_quantize, name="triton-norm-quantize")
@if_it_fits
def norm_quantize(
    x: Tensor,
    weight: Tensor | None,
    matrix: Tensor | None,
    format: str,
    eps: float,
    offset: float = 0.0,
    gain_first: bool = False,
    hadamard: bool = False,
    added: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`added` is not the op's: what is added to `x` first, and where to put the sum, contiguous; both like `x`."""
    fmt = _format(format)
    if matrix is None or matrix.dim() == 2 or x.numel() == 0:
        return norm_triton(x, weight, eps, offset, gain_first, matrix, hadamard, fmt, added=added)
    gain = (row_scales(x, eps, added), weight, float(offset) if gain_first else 0.0)
    return transform_triton(x if added is None else added[1], matrix, False, fmt, norm=gain)


@kernel("silu_mul_quantize", "cuda", takes=takes.silu_mul_quantize, name="triton-silu-mul-quantize")
@if_it_fits
def silu_mul_quantize(gate: Tensor, up: Tensor, matrix: Tensor | None, format: str, hadamard: bool = False) -> Tensor:
    return transform_triton(up, matrix, hadamard, _format(format), gate=gate)


@kernel("rope", "cuda", takes=takes.rope, name="triton-rope")
@if_it_fits
def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return transform_triton(x, None, angles=(cos, sin))


@kernel("rope_quantize", "cuda", takes=takes.rope_quantize, name="triton-rope-quantize")
@if_it_fits
def rope_quantize(
    x: Tensor, cos: Tensor, sin: Tensor, matrix: Tensor | None, format: str, hadamard: bool = False
) -> Tensor:
    return transform_triton(x, matrix, hadamard, _format(format), angles=(cos, sin))
