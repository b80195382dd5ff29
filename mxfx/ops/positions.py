"""Positions: ids for callers that give none, the mask of real tokens, and the length so far."""

from __future__ import annotations

import torch
from torch import Tensor

from mxfx.ops.catalogue import describe, plain, shape_of
from mxfx.ops.dialect import define

_TOKENS = (shape_of("input_ids"), plain("attention_mask"))
_PLACED = (*_TOKENS, plain("position_ids"))


@define("positions", operands=_PLACED)
def positions(input_ids: Tensor, position_ids: Tensor | None, attention_mask: Tensor | None) -> Tensor:
    """The position of every token, int64 ``(batch, seq)``.

    Given ``position_ids`` count as they are; else real tokens are counted (left padding does not shift them), or all
    tokens where there is no mask, or one of queries and keys, which counts nothing.
    """
    if position_ids is not None:
        return position_ids
    if attention_mask is not None and attention_mask.dim() == 2:
        return (attention_mask.ne(0).cumsum(-1) - 1).clamp_min(0)
    return torch.ones_like(input_ids).cumsum(-1) - 1


@define("real_tokens", operands=_TOKENS)
def real_tokens(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The tokenizer's mask for a model that computes with it: int64 ``(batch, seq)``, all ones where none is given."""
    return torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(torch.int64)


@define("select_tokens")
def select_tokens(x: Tensor, kept: Tensor | None) -> Tensor:
    """The tokens ``kept``, int64 ``(kept,)``, of ``x`` ``(batch, seq, channels)``; None for all of them."""
    return x if kept is None else x.index_select(1, kept)


@define("length")
def length(position_ids: Tensor) -> Tensor:
    """How long the longest text of a batch is so far: one more than its largest position, an int64 scalar."""
    return position_ids.max() + 1


describe(positions, "positions", operands=_PLACED)
describe(real_tokens, "real_tokens", operands=_TOKENS)
