"""Which operands each kernel takes, as the reason why it does not; in a graph, operands are fake tensors.

Each function has the operands of the op whose kernel it speaks of. Only shapes, dtypes and constants are read.
"""

from __future__ import annotations

from functools import lru_cache

from torch import Tensor

from mxfx.formats import Format, parse
from mxfx.ops.kernels import limits
from mxfx.ops.transform import misfit


@lru_cache(maxsize=256)
def _parsed(text: str) -> Format:
    return parse(text)


def _dtype(x: Tensor) -> str | None:
    return None if x.dtype in limits.DTYPES else f"kernels compute in up to float32, not {x.dtype}"


def _transform(x: Tensor, matrix: Tensor | None, format: str | None) -> str | None:
    fmt = None if format is None else _parsed(format)
    if fmt is not None and not limits.takes_format(fmt):
        return f"no kernel rounds onto {format}"
    unfit = None if matrix is None else misfit(x, matrix)
    if unfit is not None:
        return unfit
    if not limits.takes_transform(x, matrix, fmt):
        size = "no transform" if matrix is None else f"blocks of {matrix.shape[-1]}"
        return f"{size} and {format or 'no format'} do not share a tile on rows of {x.shape[-1]}"
    return None


def fake_quantize(x: Tensor, format: str, axis: int = -1) -> str | None:
    if x.dim() == 0 or not limits.takes_format(_parsed(format)):
        return f"no kernel rounds {'a scalar' if x.dim() == 0 else 'onto ' + format}"
    return _dtype(x)


def block_transform(x: Tensor, matrix: Tensor) -> str | None:
    return _dtype(x) or _transform(x, matrix, None)


def hadamard(x: Tensor, block: int) -> str | None:
    if block > limits.MAX_TRANSFORM:
        return hadamard_quantize(x, block, None)
    return _dtype(x) or (f"blocks of {block} do not divide rows of {x.shape[-1]}" if x.shape[-1] % block else None)


def hadamard_quantize(x: Tensor, block: int, format: str | None) -> str | None:
    if limits.takes_kronecker(x, block, None if format is None else _parsed(format)):
        return _dtype(x)
    return f"no kernel has order {block} for rows of {x.shape[-1]} and {format or 'no format'}"


def fast_hadamard(x: Tensor, block: int) -> str | None:
    if limits.takes_fast_hadamard(block):
        return _dtype(x)
    return f"the package fast-hadamard-transform is not here or has no order {block}"


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> str | None:
    if limits.takes_rope(x, cos, sin):
        return _dtype(x)
    return f"angles {tuple(cos.shape)} of {cos.dtype} do not turn all channels of {tuple(x.shape)} of {x.dtype}"


def transform_quantize(x: Tensor, matrix: Tensor | None, format: str, hadamard: bool = False) -> str | None:
    return _dtype(x) or _transform(x, matrix, format)


def norm_quantize(
    x: Tensor,
    weight: Tensor | None,
    matrix: Tensor | None,
    format: str,
    eps: float,
    offset: float = 0.0,
    gain_first: bool = False,
    hadamard: bool = False,
) -> str | None:
    # Asked at each launch: what is taken is told at once, and only what is not is looked at for the reason.
    if (matrix is None or misfit(x, matrix) is None) and limits.takes_norm(x, weight, matrix, _parsed(format)):
        return _dtype(x)
    held = f"no kernel holds a row of {x.shape[-1]} with such a gain and matrix"
    return _dtype(x) or _transform(x, matrix, format) or held


def unlike(gate: Tensor, up: Tensor) -> str | None:
    """Why a gate and what it gates do not go together; None if they do."""
    if gate.dtype != up.dtype or gate.shape != up.shape:
        return f"gate is {gate.dtype} {tuple(gate.shape)}, up is {up.dtype} {tuple(up.shape)}"
    return None


def silu_mul_quantize(
    gate: Tensor, up: Tensor, matrix: Tensor | None, format: str, hadamard: bool = False
) -> str | None:
    return unlike(gate, up) or _dtype(up) or _transform(up, matrix, format)


def heads(x: Tensor, matrix: Tensor | None, format: str | None) -> str | None:
    """Of heads that are rotated first."""
    return None if matrix is None and format is None else _transform(x, matrix, format)


def rope_quantize(
    x: Tensor, cos: Tensor, sin: Tensor, matrix: Tensor | None, format: str, hadamard: bool = False
) -> str | None:
    return rope(x, cos, sin) or _transform(x, matrix, format)
