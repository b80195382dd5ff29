"""Tiny random mixtures of experts, one for each layout that transformers' experts interface has."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch
import transformers
from torch import nn

from mxfx.graph.program import Program
from mxfx.graph.trace import trace
from tests.programs import RAISE, passed

_SIZES: Mapping[str, object] = {
    "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 128,
    "max_position_embeddings": 256, "initializer_range": 0.1, "num_local_experts": 4, "num_experts": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

#: Name → configuration class and what it adds: a plain one, one with biases of the router, one with shared experts.
MIXTURES: Mapping[str, tuple[str, Mapping[str, object]]] = {
    "mixtral": ("MixtralConfig", {}),
    "qwen2_moe": ("Qwen2MoeConfig", {"shared_expert_intermediate_size": 32, "decoder_sparse_step": 1}),
    "glm4_moe": ("Glm4MoeConfig", {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}),
}


@cache
def mixture(name: str) -> nn.Module:
    """A tiny model that tests read only; norm gains and biases are random."""
    class_name, extra = MIXTURES[name]
    config = getattr(transformers, class_name)(**{**_SIZES, **extra})
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    torch.random.set_rng_state(state)
    return model


@cache
def raised_mixture(name: str) -> Program:
    return passed(trace(mixture(name)), RAISE)
