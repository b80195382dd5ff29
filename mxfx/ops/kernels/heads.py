"""Queries, keys and values of an attention made ready at once: rotated, transformed, rounded.

On a CUDA device one kernel does so for few tokens, a step of decoding; for many each tensor has kernels of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mxfx.ops.kernels.library import NAMESPACE
from mxfx.ops.kernels.packed import _define

_KERNELS = getattr(torch.ops, NAMESPACE)


def _ready(
    x: Tensor, angles: tuple[Tensor, Tensor] | None, matrix: Tensor | None, format: str | None, hadamard: bool
) -> Tensor:
    """By the kernels that each of its steps has."""
    if angles is not None and format is not None:
        return _KERNELS.rope_quantize(x, *angles, matrix, format, hadamard)
    x = x if angles is None else _KERNELS.rope(x, *angles)
    if format is None:
        return x if matrix is None else _KERNELS.block_transform(x, matrix)
    return (
        _KERNELS.fake_quantize(x, format, -1)
        if matrix is None
        else _KERNELS.transform_quantize(x, matrix, format, hadamard)
    )


def ready_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    matrices: list[Tensor | None],
    q_format: str | None,
    k_format: str | None,
    v_format: str,
    q_hadamard: bool,
    k_hadamard: bool,
    v_hadamard: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``q`` (batch, heads, seq, width) and ``k`` (batch, kv_heads, seq, width) rotated, transformed and rounded.

    ``v`` is transformed and rounded. ``matrices`` are as for ``block_transform``, one for each, or None; a format of
    None does not round; hadamard says that a matrix's entries are all ±1/√b. The results are contiguous, ``q`` with
    its heads beside each other: attention gives its result the layout of its queries, and so nobody has to turn that.
    """
    formats, signs = (q_format, k_format, v_format), (q_hadamard, k_hadamard, v_hadamard)
    angles = ((cos, sin), (cos, sin), None)
    parts = zip((q, k, v), angles, matrices, formats, signs, strict=True)
    one, two, three = (_ready(*part) for part in parts)
    return one.transpose(1, 2).contiguous().transpose(1, 2), two.contiguous(), three.contiguous()


def heads_together(x: Tensor) -> Tensor:
    """An empty tensor like ``x``, (batch, heads, seq, width), in which a token's heads are beside each other."""
    batch, heads, seq, width = x.shape
    return x.new_empty(batch, seq, heads, width).transpose(1, 2)


def _fake(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor]:
    return heads_together(q), k.new_empty(k.shape), v.new_empty(v.shape)


READY = _define("ready_heads", ready_heads, _fake, "heads_triton")
