"""A model that reads its text one token a step, through the cache: what decoding sees, scored like a prefill.

Of a program with phases it is decode's program alone, from the first token on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from mxfx.runtime.causal_lm import EmittedCausalLM


class Stepwise:
    """Behaves like a causal LM without a cache: ``.config``, ``.device``, logits of whole texts."""

    def __init__(self, model: EmittedCausalLM) -> None:
        self.model = model
        self.config = model.config
        model.new_cache()  # raises CacheError for a model without one

    @property
    def device(self) -> torch.device:
        return self.model.device

    def to(self, *args: Any) -> Stepwise:
        self.model.to(*args)
        return self

    def eval(self) -> Stepwise:
        return self

    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> CausalLMOutputWithPast:
        """Logits ``(batch, seq, vocabulary)`` of ``seq`` steps."""
        cache = self.model.new_cache(input_ids.shape[1])
        parts = []
        for at in range(input_ids.shape[1]):
            mask = None if attention_mask is None else attention_mask[:, : at + 1]
            one = input_ids[:, at : at + 1]
            parts.append(self.model(one, attention_mask=mask, past_key_values=cache, phase="decode").logits)
        return CausalLMOutputWithPast(logits=torch.cat(parts, dim=1))
