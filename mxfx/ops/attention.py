"""``mxfx::attention``, masks as functions of places, and the pieces that ``lower`` shares between layers.

The *place* of a token is its index among all tokens of its row, padding and cached ones included. Keys stand at places
``0 … keys - 1``; queries are the last of them. So every mask here holds for a whole prefix, for a chunk of it and for a
single token against a cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mxfx.ops.catalogue import Contraction, activation, describe, inside, plain, shape_of
from mxfx.ops.dialect import compute, define


def _allowed(
    mask: Tensor | None,
    queries: int,
    like: Tensor,
    keys: int,
    causal: bool,
    window: int | None,
    chunk: int | None,
    slots: Tensor | None = None,
) -> Tensor:
    """Boolean ``(batch | 1, 1, queries, keys)`` on the device of ``like``; see ``attention``.

    The queries are the last tokens, or those at ``slots``.
    """
    places = torch.arange(keys, device=like.device)
    mine = places[keys - queries :] if slots is None else slots
    distance = mine[:, None] - places[None, :]
    allowed = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    if window is not None:
        allowed = allowed & (distance < window)
    allowed = allowed[None, None]
    if chunk is not None:
        # Chunks are counted from the first real token of a row.
        start = 0 if mask is None else (mask.ne(0).cumsum(-1) == 0).sum(-1, keepdim=True)
        number = (places[None, :] - start) // chunk
        own = number[:, keys - queries :] if slots is None else number.index_select(1, slots)
        allowed = allowed & (own[:, :, None] == number[:, None, :])[:, None]
    if mask is not None:
        allowed = allowed & mask.ne(0)[:, None, None, :] | (distance == 0)[None, None]
    return allowed


def attention_bias(
    mask: Tensor | None, query: Tensor, key: Tensor, causal: bool, window: int | None, chunk: int | None = None
) -> Tensor | None:
    """Boolean mask ``(batch | 1, 1, queries, keys)``, True where a query may attend; None where ``is_causal`` says all.

    ``mask`` is the tokenizer's ``(batch, keys)`` mask (nonzero: a real token) or a ready 4-D boolean mask; ``query``
    and ``key``, ``(batch, heads, tokens, head_dim)``, give lengths and device. A query that may attend to nothing (left
    padding) attends to itself, so that its row stays finite; nobody reads it.
    """
    if mask is not None and mask.dim() == 4:
        return mask
    queries, keys = query.shape[-2], key.shape[-2]
    if mask is None and window is None and chunk is None and not (causal and queries != keys):
        return None
    return _allowed(mask, queries, query, keys, causal, window, chunk)


describe(attention_bias, "attention_bias", operands=(plain("mask"), shape_of("query"), shape_of("key")))
_TOKENS = (shape_of("tokens"),)


@define("position_mask", operands=_TOKENS)
def position_mask(
    tokens: Tensor,
    mask: Tensor | None,
    causal: bool,
    window: int | None,
    chunk: int | None,
    slots: Tensor | None = None,
) -> Tensor:
    """The mask of ``attention`` as a tensor, for a model that computes with it: boolean ``(batch, 1, seq, seq)``.

    ``tokens`` is ``(batch, seq)``; the rest as for ``attention``. With a cache, queries are the tokens at ``slots``.
    """
    batch, length = tokens.shape
    queries = length if slots is None else slots.shape[0]
    allowed = _allowed(mask, length, tokens, length, causal, window, chunk, slots)
    return allowed.expand(batch, 1, queries, length)


describe(position_mask, "position_mask", operands=_TOKENS)


@define("places", operands=_TOKENS)
def places(tokens: Tensor, of: str, slots: Tensor | None = None) -> Tensor:
    """Places of the ``queries`` or of the ``keys`` of a batch ``(batch, seq)``: int64 ``(seq,)``.

    With a cache, queries stand at the ``slots`` of the new tokens.
    """
    return torch.arange(tokens.shape[1], device=tokens.device) if slots is None else slots


describe(places, "places", operands=_TOKENS)


@define("at_slots")
def at_slots(x: Tensor, slots: Tensor | None) -> Tensor:
    """What ``x``, ``(batch | 1, heads | 1, places, places)`` over a whole text, says of the queries at ``slots``.

    ``slots`` is int64 ``(queries,)``; None for all of them, in a call without a cache.
    """
    return x if slots is None else x.index_select(-2, slots)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    allowed: Tensor | None,
    scale: float,
    causal: bool,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """``attention`` with its mask as a tensor, None for a causal or an absent one; see there."""
    grouped = bool(q.shape[1] != k.shape[1])
    if allowed is None and causal and not (softcap is None and sinks is None and bias is None):
        allowed = _allowed(None, q.shape[-2], q, k.shape[-2], causal, None, None)
    if softcap is None and sinks is None:
        mask = allowed
        if bias is not None:
            mask = bias if allowed is None else bias.masked_fill(~allowed, float("-inf"))
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal and mask is None, scale=scale, enable_gqa=grouped
        )
    if grouped:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores + bias
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    if sinks is not None:
        column = sinks.reshape(1, -1, 1, 1) if sinks.dim() == 1 else sinks
        scores = torch.cat((scores, column.expand(*scores.shape[:-1], 1).to(scores.dtype)), -1)
    probs = torch.softmax(compute(scores), -1).to(q.dtype)
    return probs[..., : k.shape[-2]] @ v


def _attended(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """``(batch, heads, queries, head_dim of v)``; the kernel's own checks on symbolic sizes would guard on them.

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
    if sinks is not None and not _are_sinks(sinks, q.shape[1]):
        raise ValueError(
            f"sinks are {tuple(sinks.shape)}, one for each of the {q.shape[1]} query heads is needed: (heads,), or "
            "(batch | 1, heads, queries | 1, 1)"
        )
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


def _are_sinks(sinks: Tensor, heads: int) -> bool:
    if sinks.dim() == 1:
        return bool(sinks.shape[0] == heads)
    return sinks.dim() == 4 and bool(sinks.shape[1] == heads) and bool(sinks.shape[3] == 1)


def _attend_shape(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    allowed: Tensor | None,
    scale: float,
    causal: bool,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    return _attended(q, k, v, None, scale, causal, sinks=sinks)


_OPERANDS = (activation("q"), activation("k"), activation("v"), inside("probs"), inside("softmax"))
_CONTRACTS = (
    Contraction("q", "k", over="head_dim"),
    # Blocks of a value run along head_dim, those of a cache too: a 4-bit product would need them along seq.
    Contraction("probs", "v", axes=(-1, -2), over="seq"),
)
describe(attend, "attend", operands=(plain("q"), plain("k"), plain("v")), shape=_attend_shape)


@define("attention", operands=_OPERANDS, contracts=_CONTRACTS, fake=_attended)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Softmax attention (arXiv 1706.03762, eq. 1), grouped heads (arXiv 2305.13245).

    ``q`` is ``(batch, heads, queries, head_dim)``, ``k`` ``(batch, kv_heads, keys, head_dim)``, ``v`` ``(batch,
    kv_heads, keys, value_dim)``; the result ``(batch, heads, queries, value_dim)``. The queries are the last of the
    keys: with a cache there are fewer.

    ``mask`` is ``(batch, keys)``, nonzero where a token is real, and joins with ``causal``, ``window`` and ``chunk``:
    a query attends to the last ``window`` places, itself included (sliding windows), and to places of its own
    ``chunk``, counted from the row's first real token (chunked attention). Any other mask comes whole, boolean
    ``(batch | 1, heads | 1, queries, keys)``, and nothing else is joined to it.

    ``softcap`` c bounds the scaled scores s to c·tanh(s / c) (arXiv 2408.00118, §2). ``bias``, ``(batch | 1, heads | 1,
    queries | 1, keys)``, is added to the scores (arXiv 2108.12409). ``sinks`` ``(heads,)`` are scores of one more key
    per head, which takes part in the softmax and has no value (arXiv 2309.17453, as in gpt-oss); ``(batch | 1, heads,
    queries | 1, 1)`` where each query has its own.
    """
    allowed = attention_bias(mask, q, k, causal, window, chunk)
    return attend(q, k, v, allowed, scale, causal, softcap, sinks, bias)
