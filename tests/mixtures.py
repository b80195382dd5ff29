"""Tiny random mixtures of experts: every layout that transformers' experts interface serves, and batched products."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mxfx.graph.program import Program
from mxfx.graph.trace import trace
from tests.programs import RAISE, passed

#: What a configuration takes of these it gets: families call the same size by many names.
_SIZES: Mapping[str, object] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 128, "max_position_embeddings": 256,
    "initializer_range": 0.1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_k": 2, "moe_topk": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16,
}  # fmt: skip
_LATENT = {"num_key_value_heads": 4}

#: Type of model → what it needs beside the sizes.
MIXTURES: Mapping[str, Mapping[str, object]] = {
    "mixtral": {},
    "qwen2_moe": {},
    "qwen3_moe": {},
    "flex_olmo": {},
    "phimoe": {},
    "granitemoe": {},
    "granitemoeshared": {},
    "gpt_oss": {"sliding_window": 8},
    "llama4_text": {
        "intermediate_size": 32, "intermediate_size_mlp": 96, "interleave_moe_layer_step": 2,
        "num_experts_per_tok": 1, "attention_chunk_size": 8,
    },
    "glm4_moe": {},
    "glm4_moe_lite": _LATENT,
    "ernie4_5_moe": {},
    "exaone_moe": {"sliding_window": 8, "num_hidden_layers": 4},
    "hunyuan_v1_moe": {},
    "cohere2_moe": {"sliding_window": 8, "num_hidden_layers": 4},
    "solar_open": {},
    "hy_v3": {},
    "laguna": {"sliding_window": 8},
    "gemma4_text": {
        "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"], "enable_moe_block": True,
        "top_k_experts": 2, "hidden_size_per_layer_input": 0, "global_head_dim": 32,
    },
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "jetmoe": {"kv_channels": 16},
}  # fmt: skip


@cache
def mixture(name: str) -> nn.Module:
    """A tiny model that tests read only; norm gains and biases are random."""
    kind = CONFIG_MAPPING[name]
    config = kind(**{key: value for key, value in _SIZES.items() if hasattr(kind, key)} | dict(MIXTURES[name]))
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    torch.random.set_rng_state(state)
    return model


@cache
def traced_mixture(name: str) -> Program:
    return trace(mixture(name))


@cache
def raised_mixture(name: str) -> Program:
    return passed(traced_mixture(name), RAISE)
