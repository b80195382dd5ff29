"""``mxfx::hadamard`` and ``mxfx::block_transform``: orthogonal and data-aware transforms of the last axis."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from mxfx.algorithms.hadamard import hadamard_factors, hadamard_transform
from mxfx.ops.dialect import compute, define


@define("block_transform")
def block_transform(x: Tensor, matrix: Tensor) -> Tensor:
    """Multiply each block of the last axis by a matrix: ``x_B @ T_B``; same shape and dtype as ``x``.

    ``matrix`` is ``(block, block)``, shared by all blocks; ``(blocks, block, block)``; or ``(heads, blocks, block, block)``
    for ``x`` of shape ``(batch, heads * group, seq, blocks * block)``, where ``group`` neighbouring heads share a matrix.
    """
    wide = compute(x)
    matrix = matrix.to(wide.dtype)
    split = wide.unflatten(-1, (-1, matrix.shape[-1]))
    if matrix.dim() == 2:
        return (split @ matrix).flatten(-2).to(x.dtype)
    if matrix.dim() == 3:
        return (split.unsqueeze(-2) @ matrix).squeeze(-2).flatten(-2).to(x.dtype)
    grouped = split.unflatten(1, (matrix.shape[0], -1))
    # (batch, heads, group, blocks, seq, block) @ (heads, 1, blocks, block, block)
    moved = grouped.transpose(3, 4) @ matrix.unsqueeze(1)
    return moved.transpose(3, 4).flatten(-2).flatten(1, 2).to(x.dtype)


@define("hadamard")
def hadamard(x: Tensor, block: int) -> Tensor:
    """Multiply each block of the last axis by the orthonormal Hadamard matrix of that order; ``block`` divides it.

    Same shape and dtype as ``x``. Raises ``ValueError`` where no Hadamard matrix of that order is known.
    """
    if x.is_meta or isinstance(x, FakeTensor):
        # A shape is all that is asked for; a matrix built from Python numbers would be real there, not fake.
        hadamard_factors(block)
        return torch.empty_like(x)
    return hadamard_transform(x, block)
