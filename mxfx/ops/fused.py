"""Fused forms: a producer, a block transform and a quantizer as one op, so that `lower` can find one kernel for it.

Each is defined as the composition of the ops that it replaces. `matrix` is (b, b), (blocks, b, b) or (heads, blocks,
b, b) as for `block_transform`, or None for no transform; `hadamard` says that its entries are all ±1/√b.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from mxfx.formats import parse
from mxfx.ops.catalogue import Rounding, plain
from mxfx.ops.dialect import define
from mxfx.ops.norm import rms_norm
from mxfx.ops.quantize import fake_quantize
from mxfx.ops.rope import rope
from mxfx.ops.transform import block_transform, hadamard, require_fit

_INPUT = (plain("input", "x"),)


def _stated(x: Tensor, matrix: Tensor | None, format: str) -> Tensor:
    """All that the verifier needs of a transform and a quantizer, which take seconds on symbolic sizes."""
    if matrix is not None:
        require_fit(x, matrix)
    parse(format)
    return x.new_empty(x.shape)


def _shape_of_transform(x: Tensor, matrix: Tensor | None, format: str, hadamard: bool = False) -> Tensor:
    return _stated(x, matrix, format)


def _shape_of_hadamard(x: Tensor, block: int, format: str) -> Tensor:
    return _stated(hadamard(x, block), None, format)


def _shape_of_norm(
    x: Tensor,
    weight: Tensor | None,
    matrix: Tensor | None,
    format: str,
    eps: float,
    offset: float = 0.0,
    gain_first: bool = False,
    hadamard: bool = False,
) -> Tensor:
    return _stated(rms_norm(x, weight, eps, offset, gain_first), matrix, format)


def _shape_of_silu_mul(gate: Tensor, up: Tensor, matrix: Tensor | None, format: str, hadamard: bool = False) -> Tensor:
    return _stated(F.silu(gate) * up, matrix, format)


def _shape_of_rope(
    x: Tensor, cos: Tensor, sin: Tensor, matrix: Tensor | None, format: str, hadamard: bool = False
) -> Tensor:
    return _stated(rope(x, cos, sin), matrix, format)


@define("transform_quantize", operands=_INPUT, rounds=Rounding(), shape=_shape_of_transform)
def transform_quantize(x: Tensor, matrix: Tensor | None, format: str, hadamard: bool = False) -> Tensor:
    """`fake_quantize(block_transform(x, matrix), format)`; same shape `(..., n)` and dtype as `x`."""
    return fake_quantize(_transformed(x, matrix), format)


@define("hadamard_quantize", operands=_INPUT, rounds=Rounding(), shape=_shape_of_hadamard)
def hadamard_quantize(x: Tensor, block: int, format: str) -> Tensor:
    """`fake_quantize(hadamard(x, block), format)` without a stored matrix; same shape `(..., n)` and dtype as `x`."""
    return fake_quantize(hadamard(x, block), format)


@define("norm_quantize", operands=_INPUT, rounds=Rounding(), shape=_shape_of_norm)
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
    """`rms_norm` (see there), transform, quantize; same shape `(..., hidden)` and dtype as `x`."""
    return fake_quantize(_transformed(rms_norm(x, weight, eps, offset, gain_first), matrix), format)


@define("silu_mul_quantize", operands=(plain("gate"), plain("up")), rounds=Rounding(), shape=_shape_of_silu_mul)
def silu_mul_quantize(gate: Tensor, up: Tensor, matrix: Tensor | None, format: str, hadamard: bool = False) -> Tensor:
    """`silu(gate) * up` (SwiGLU, arXiv 2002.05202, eq. 5), transform, quantize; shape `(..., n)` of both inputs."""
    return fake_quantize(_transformed(F.silu(gate) * up, matrix), format)


@define("rope_quantize", operands=_INPUT, rounds=Rounding(), shape=_shape_of_rope)
def rope_quantize(
    x: Tensor, cos: Tensor, sin: Tensor, matrix: Tensor | None, format: str, hadamard: bool = False
) -> Tensor:
    """`rope` (see there), transform, quantize along the head dimension; `x` is `(batch, heads, seq, head_dim)`."""
    return fake_quantize(_transformed(rope(x, cos, sin), matrix), format)


#: Ops that hold a quantizer.
FUSED = frozenset({"transform_quantize", "hadamard_quantize", "norm_quantize", "silu_mul_quantize", "rope_quantize"})


def _transformed(x: Tensor, matrix: Tensor | None) -> Tensor:
    return x if matrix is None else block_transform(x, matrix)
