"""``mxfx::hadamard`` and ``mxfx::block_transform``: orthogonal and data-aware transforms of the last axis."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from mxfx.algorithms.hadamard import hadamard_factors, hadamard_transform
from mxfx.ops.catalogue import plain, weight
from mxfx.ops.dialect import compute, define


def _transformed(x: Tensor, matrix: Tensor) -> Tensor:
    """All that a trace needs to know; the products on symbolic sizes would cost it seconds."""
    require_fit(x, matrix)
    return x.new_empty(x.shape)


def require_fit(x: Tensor, matrix: Tensor) -> None:
    """Raise ``ValueError`` for a matrix of which ``block_transform`` has another number than ``x`` has blocks."""
    reason = misfit(x, matrix)
    if reason is not None:
        raise ValueError(f"block_transform: {reason}")


def misfit(x: Tensor, matrix: Tensor) -> str | None:
    """Why a matrix cannot transform the last axis of ``x``; None if it can. Only shapes are read."""
    # Kernels ask at each launch, and reading a shape of a tensor takes the host as long as all that is done with it.
    shape, of = x.shape, matrix.shape
    dims, width, block = len(of), shape[-1], of[-1]
    if dims not in (2, 3, 4) or block != of[-2]:
        return (
            f"the matrix is {tuple(of)}, expected (block, block), (blocks, block, block) "
            "or (heads, blocks, block, block)"
        )
    if width % block:
        return f"blocks of {block} do not divide the last axis of {tuple(shape)}"
    if dims > 2 and of[-3] != width // block:
        return f"{of[-3]} blocks of {block} do not make up the last axis of {tuple(shape)}"
    if dims == 4 and (len(shape) != 4 or shape[1] % of[0]):
        return f"{of[0]} heads of matrices do not fit {tuple(shape)}, expected (batch, heads, seq, width)"
    return None


@define("block_transform", operands=(plain("input", "x"), weight("matrix")), fake=_transformed)
def block_transform(x: Tensor, matrix: Tensor) -> Tensor:
    """Multiply each block of the last axis by a matrix: ``x_B @ T_B``; same shape and dtype as ``x``.

    ``matrix`` is ``(block, block)``, shared by all blocks; ``(blocks, block, block)``; or
    ``(heads, blocks, block, block)`` for ``x`` of shape ``(batch, heads * group, seq, blocks * block)``, where
    ``group`` neighbouring heads share a matrix. Raises ``ValueError`` for shapes that do not fit each other.
    """
    require_fit(x, matrix)
    block = matrix.shape[-1]
    # Products of bfloat16 are exact in float32, in which a GEMM of bfloat16 sums: it rounds once, as the wide one does,
    # and takes a tenth of the time on a CPU. AMX tiles are 32 deep, and oneDNN fills the last one with what lies behind
    # the row, times zero: NaN in one block would spoil its neighbour, so other blocks are multiplied in float32.
    narrow = x.dtype == matrix.dtype == torch.bfloat16 and block % 32 == 0
    wide = x if narrow else compute(x)
    matrix = matrix.to(wide.dtype)
    if matrix.dim() == 2:
        return (wide.unflatten(-1, (-1, block)) @ matrix).flatten(-2).to(x.dtype)
    # One batched product per block. A broadcasting matmul would expand to sizes, which a trace would fix.
    if matrix.dim() == 3:
        blocks = wide.reshape(-1, matrix.shape[0], block).transpose(0, 1)
        return torch.bmm(blocks, matrix).transpose(0, 1).reshape(x.shape).to(x.dtype)
    heads, count = matrix.shape[:2]
    grouped = wide.unflatten(1, (heads, -1)).unflatten(-1, (count, block))  # (batch, heads, group, seq, blocks, block)
    batched = grouped.permute(1, 4, 0, 2, 3, 5)
    # Where a reshape has a size to infer, a trace counts elements, which Dynamo cannot follow.
    moved = torch.bmm(batched.flatten(2, 4).flatten(0, 1), matrix.flatten(0, 1))
    # With one block a head the reshape is a view: contiguous is what a trace is told.
    return moved.reshape(batched.shape).permute(2, 0, 3, 4, 1, 5).reshape(x.shape).to(x.dtype).contiguous()


def matrix_gradient(x: Tensor, matrix: Tensor, grad: Tensor) -> Tensor:
    """Derivative of ``block_transform(x, matrix)`` by ``matrix``: ``x_Bᵀ grad_B`` over tokens; like ``matrix``."""
    block = matrix.shape[-1]

    def rows(t: Tensor) -> Tensor:
        if matrix.dim() < 4:
            return t.reshape(-1, t.shape[-1] // block, block).transpose(0, 1)
        grouped = t.unflatten(1, (matrix.shape[0], -1)).unflatten(-1, (-1, block))
        return grouped.permute(1, 4, 0, 2, 3, 5).flatten(2, 4).flatten(0, 1)

    moment = torch.bmm(rows(x).mT, rows(grad))
    return (moment.sum(0) if matrix.dim() == 2 else moment.reshape(matrix.shape)).to(matrix.dtype)


@define("hadamard", operands=(plain("input", "x"),))
def hadamard(x: Tensor, block: int) -> Tensor:
    """Multiply each block of the last axis by the orthonormal Hadamard matrix of that order; ``block`` divides it.

    Same shape and dtype as ``x``. Raises ``ValueError`` where no Hadamard matrix of that order is known.
    """
    if x.is_meta or isinstance(x, FakeTensor):
        # A shape is all that is asked for; a matrix built from Python numbers would be real there, not fake.
        hadamard_factors(block)
        return x.new_empty(x.shape)
    return hadamard_transform(x, block).contiguous()
