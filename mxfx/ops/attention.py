"""``mxfx::attention`` and the pieces that ``lower`` shares between layers."""

from __future__ import annotations

import torch
from torch import Tensor

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
    """The shape of the result; running the kernel's own checks on symbolic sizes would guard on them (torch 2.11)."""
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


@define("attention", fake=_attended)
def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool = True, window: int | None = None
) -> Tensor:
    """Softmax attention (arXiv 1706.03762, eq. 1), grouped heads (arXiv 2305.13245).

    ``q`` is ``(batch, heads, seq, head_dim)``, ``k`` and ``v`` are ``(batch, kv_heads, seq, head_dim)``; ``mask`` is
    ``(batch, seq)``, nonzero where a token is real. ``window`` limits a query to the last ``window`` positions, itself
    included (sliding windows). Returns ``(batch, heads, seq, head_dim)``.
    """
    return attend(q, k, v, attention_bias(mask, q, causal, window), scale, causal)
