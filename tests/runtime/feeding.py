"""Texts that a cache reads in pieces."""

from __future__ import annotations

import torch
from torch import Tensor

from mxfx.runtime.causal_lm import EmittedCausalLM


def steps(lm: EmittedCausalLM, ids: Tensor, mask: Tensor, lengths: list[int]) -> Tensor:
    """Logits of all tokens, fed to the cache in pieces."""
    held, start, parts = lm.new_cache(), 0, []
    for length in lengths:
        stop = start + length
        out = lm(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=held)
        assert out.past_key_values is held and held.get_seq_length() == stop
        parts.append(out.logits)
        start = stop
    return torch.cat(parts, 1)
