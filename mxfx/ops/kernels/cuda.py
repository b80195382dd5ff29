"""The ops on a CUDA device: each gives the kernel's result, or `NotImplemented` for operands that no kernel takes.

Where a device has too little shared memory for a tile, a warning says so, once, before `NotImplemented`.

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
from mxfx.ops.kernels.kronecker_triton import kronecker_triton
from mxfx.ops.kernels.library import signs_of
from mxfx.ops.kernels.limits import (
    DTYPES,
    takes_format,
    takes_kronecker,
    takes_norm,
    takes_rope,
    takes_transform,
)
from mxfx.ops.kernels.norm_triton import norm_triton, row_scales
from mxfx.ops.kernels.quantize_triton import fake_quantize_triton
from mxfx.ops.kernels.transform_triton import transform_triton


@lru_cache(maxsize=256)
def _format(text: str) -> Format:
    return parse(text)


def _if_it_fits(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
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


def fake_quantize(x: Tensor, format: str, axis: int = -1) -> Tensor:
    fmt = _format(format)
    if x.dtype not in DTYPES or not takes_format(fmt) or x.dim() == 0:
        return NotImplemented
    if axis in (-1, x.dim() - 1) or fmt.block is None:
        return fake_quantize_triton(x, fmt)
    return fake_quantize_triton(x.movedim(axis, -1), fmt).movedim(-1, axis).contiguous()


@_if_it_fits
def block_transform(x: Tensor, matrix: Tensor) -> Tensor:
    if x.dtype not in DTYPES or not takes_transform(x, matrix, None):
        return NotImplemented
    return transform_triton(x, matrix)


@_if_it_fits
def hadamard(x: Tensor, block: int) -> Tensor:
    if block > DENSE_ORDER:
        return _kronecker(x, block, None)
    matrix = signs_of(block, x.device)
    if x.dtype not in DTYPES or not takes_transform(x, matrix, None):
        return NotImplemented
    return transform_triton(x, matrix, signs=True)


@_if_it_fits
def hadamard_quantize(x: Tensor, block: int, format: str) -> Tensor:
    return _kronecker(x, block, _format(format))


def _kronecker(x: Tensor, order: int, fmt: Format | None) -> Tensor:
    if x.dtype not in DTYPES or not takes_kronecker(x, order, fmt):
        return NotImplemented
    return kronecker_triton(x, order, fmt)


@_if_it_fits
def transform_quantize(x: Tensor, matrix: Tensor | None, format: str, hadamard: bool = False) -> Tensor:
    fmt = _format(format)
    if x.dtype not in DTYPES or not takes_transform(x, matrix, fmt):
        return NotImplemented
    return transform_triton(x, matrix, hadamard, fmt)


@_if_it_fits
def norm_quantize(
    x: Tensor,
    weight: Tensor | None,
    matrix: Tensor | None,
    format: str,
    eps: float,
    offset: float = 0.0,
    gain_first: bool = False,
    hadamard: bool = False,
) -> Tensor:
    fmt = _format(format)
    if x.dtype not in DTYPES or not takes_norm(x, weight, matrix, fmt):
        return NotImplemented
    if matrix is None or matrix.dim() == 2 or x.numel() == 0:
        return norm_triton(x, weight, eps, offset, gain_first, matrix, hadamard, fmt)
    gain = (row_scales(x, eps), weight, float(offset) if gain_first else 0.0)
    return transform_triton(x, matrix, False, fmt, norm=gain)


@_if_it_fits
def silu_mul_quantize(gate: Tensor, up: Tensor, matrix: Tensor | None, format: str, hadamard: bool = False) -> Tensor:
    fmt = _format(format)
    same = gate.dtype == up.dtype and gate.shape == up.shape
    if up.dtype not in DTYPES or not same or not takes_transform(up, matrix, fmt):
        return NotImplemented
    return transform_triton(up, matrix, hadamard, fmt, gate=gate)


@_if_it_fits
def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    if x.dtype not in DTYPES or not takes_rope(x, cos, sin):
        return NotImplemented
    return transform_triton(x, None, angles=(cos, sin))


@_if_it_fits
def rope_quantize(
    x: Tensor, cos: Tensor, sin: Tensor, matrix: Tensor | None, format: str, hadamard: bool = False
) -> Tensor:
    fmt = _format(format)
    if x.dtype not in DTYPES or not takes_rope(x, cos, sin) or not takes_transform(x, matrix, fmt):
        return NotImplemented
    return transform_triton(x, matrix, hadamard, fmt, angles=(cos, sin))
