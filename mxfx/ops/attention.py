"""``mxfx::attention`` and the pieces that ``lower`` shares between layers."""

from __future__ import annotations

import torch
from torch import Tensor

from mxfx.ops.catalogue import Contraction, activation, describe, inside, plain
from mxfx.ops.dialect import define


def attention_bias(mask: Tensor | None, query: Tensor, causal: bool, window: int | None) -> Tensor | None:
    """Boolean mask ``(batch | 1, 1, seq, seq)``, True where a query may attend; None where ``is_causal`` says it all.

    ``mask`` is the tokenizer's ``(batch, seq)`` mask (nonzero: a real token) or a ready 4-D boolean mask; ``query``
    gives sequence length and device. A query that may attend to nothing (left padding) attends to itself, so that its
    row stays finite; nobody reads it.
    """
    if mask is None and window is None:
        return None
    if mask is not None and mask.dim() == 4:
        return mask
    length = query.shape[-2]
    position = torch.arange(length, device=query.device)
    distance = position[:, None] - position[None, :]
    allowed = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    if window is not None:
        allowed = allowed & (distance < window)
    allowed = allowed[None, None]
    if mask is not None:
        allowed = allowed & mask.ne(0)[:, None, None, :] | (distance == 0)[None, None]
    return allowed


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, causal: bool) -> Tensor:
    """Scaled dot-product attention with grouped key-value heads; see ``attention``."""
    grouped = bool(q.shape[1] != k.shape[1])
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=bias, is_causal=causal and bias is None, scale=scale, enable_gqa=grouped
    )


def _attended(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool = True, window: int | None = None
) -> Tensor:
    """``(batch, heads, seq, head_dim of v)``; the kernel's own checks on symbolic sizes would guard on them.

    Raises ``ValueError`` for shapes that attention cannot take.
    """
    if not q.dim() == k.dim() == v.dim() == 4:
        raise ValueError(f"attention takes (batch, heads, seq, head_dim), not {q.dim()}, {k.dim()} and {v.dim()} axes")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"q has head_dim {q.shape[3]}, k has {k.shape[3]}")
    if k.shape[1] != v.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads cannot share {k.shape[1]} key heads and {v.shape[1]} value heads")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q is {q.dtype}, k is {k.dtype}, v is {v.dtype}")
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


def _attend_shape(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, causal: bool) -> Tensor:
    return _attended(q, k, v, None, scale, causal)


_OPERANDS = (activation("q"), activation("k"), activation("v"), inside("probs"), inside("softmax"))
_CONTRACTS = (
    Contraction("q", "k", over="head_dim"),
    # Blocks of a value run along head_dim, those of a cache too: a 4-bit product would need them along seq.
    Contraction("probs", "v", axes=(-1, -2), over="seq"),
)
describe(attend, "attend", operands=(plain("q"), plain("k"), plain("v")), shape=_attend_shape)


@define("attention", operands=_OPERANDS, contracts=_CONTRACTS, fake=_attended)
def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool = True, window: int | None = None
) -> Tensor:
    """Softmax attention (arXiv 1706.03762, eq. 1), grouped heads (arXiv 2305.13245).

    ``q`` is ``(batch, heads, seq, head_dim)``, ``k`` and ``v`` are ``(batch, kv_heads, seq, head_dim)``; ``mask`` is
    ``(batch, seq)``, nonzero where a token is real. ``window`` limits a query to the last ``window`` positions, itself
    included (sliding windows). Returns ``(batch, heads, seq, head_dim)``.
    """
    return attend(q, k, v, attention_bias(mask, q, causal, window), scale, causal)
