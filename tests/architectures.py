"""Every decoder-only architecture of the installed transformers as a tiny random model, made from its configuration.

The list is computed. Sizes are chosen by the names of configuration fields, and per-layer lists are cut to the layers
that are left; an architecture is decoder-only if it takes text alone and its logits do not depend on later tokens.
"""

from __future__ import annotations

import inspect
import json
import os
import resource
import signal
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from mxfx.graph.tiny import shaken

VOCABULARY = 128
#: Field → tiny value, for every configuration class that has the field.
SIZES: dict[str, object] = {
    "vocab_size": VOCABULARY, "vocab_size_per_layer_input": VOCABULARY, "hidden_size": 64, "intermediate_size": 96,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.1, "init_std": 0.1,
    "sliding_window": 8, "attention_chunk_size": 8, "local_attention": 8, "attention_window_size": 8,
    "word_embed_proj_dim": 64, "ffn_dim": 96, "d_ff": 96, "rotary_dim": 8, "hidden_size_per_layer_input": 16,
    "global_head_dim": 16, "laurel_rank": 16, "logits_scaling": 1.5, "residual_multiplier": 0.5,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_topk": 2, "moe_k": 2, "top_k_experts": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32, "intermediate_size_mlp": 96, "expert_ffn_hidden_size": 32, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1, "num_dense_layers": 1, "zero_expert_num": 1,
    "block_size": 16, "d_head": 16, "attention_types": [[["global", "local"], 1]], "window_size": 8,
    "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    "o_lora_rank": 16, "index_topk": 8, "index_head_dim": 16, "index_n_heads": 2, "swa_head_dim": 16,
    "swa_v_head_dim": 16, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_head_dim": 16, "linear_num_heads": 4, "kv_channels": 16, "lru_width": 64,
    "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 8, "mamba_d_ssm": 128,
    "mamba_n_groups": 1, "n_mamba_heads": 2, "mamba_num_heads": 8, "mamba_head_dim": 16, "state_size": 16,
    "ssm_state_size": 16, "n_groups": 1, "chunk_size": 8, "num_heads": 8, "attention_hidden_size": 64,
    "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_headdim": 16, "mamba_ngroups": 1, "mamba_dt_rank": 4,
}  # fmt: skip
_LAYERS = 2
#: How much of a machine one may take.
_MEMORY, _SECONDS = 8 << 30, 600
#: Lists of layers that a configuration makes itself; they need as many layers as its pattern is long.
_OF_LAYERS = ("layer_types", "layers_block_type", "mlp_layer_types", "hybrid_layer_ids")
#: Changes of the sizes, tried in this order until one fits.
VARIANTS: tuple[Mapping[str, object], ...] = (
    {},
    {"num_key_value_heads": 4},
    {"num_key_value_heads": 4, "head_dim": 8},
    {"num_experts_per_tok": 1},
    {"num_kv_shared_layers": 0},
    {"layers": 4, "defaults": _OF_LAYERS},
    {"layers": 4, "num_key_value_heads": 4, "defaults": _OF_LAYERS},
    *({"layer_types": [kind, "full_attention"]} for kind in ("conv", "linear_attention", "sliding_attention")),
    {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8,
        "indexer_compress_ratio": 4, "hc_lowrank": 16,
    },
)  # fmt: skip


def every_name() -> tuple[str, ...]:
    """Model types with a causal LM that takes text alone and has no encoder."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return tuple(name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if _is_text_decoder(CONFIG_MAPPING[name]))


def _is_text_decoder(config: type) -> bool:
    return not config.sub_configs and not getattr(config, "is_encoder_decoder", False)


class NotCausal(ValueError):
    """An encoder with a language-modelling head: its logits see later tokens."""


class Unbuilt(ValueError):
    """Tiny sizes do not fit this configuration."""


def build(name: str, seed: int = 0) -> nn.Module:
    """A tiny random model in float32, eval mode. Raises ``NotCausal``, or ``Unbuilt`` with what transformers says."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    refused: list[Exception] = []
    for variant in VARIANTS:
        try:
            return _build(CONFIG_MAPPING[name], variant, seed)
        except NotCausal:
            raise
        except Exception as error:
            refused.append(error)
    lines = [f"{type(e).__name__}: {str(e).strip().splitlines()[0] if str(e) else ''}" for e in refused]
    raise Unbuilt("; ".join(dict.fromkeys(lines)))


def _build(config: type, variant: Mapping[str, object], seed: int) -> nn.Module:
    from transformers import AutoModelForCausalLM

    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        model = shaken(AutoModelForCausalLM.from_config(tiny_config(config, variant)).float().eval())
        ids = torch.randint(3, VOCABULARY, (2, 12))
        mask = torch.ones_like(ids)
        mask[0, :2] = 0
        with torch.no_grad():
            model(input_ids=ids, attention_mask=mask, use_cache=False)
            long, short = (model(input_ids=x, use_cache=False).logits[:, :7] for x in (ids, ids[:, :7]))
    finally:
        torch.random.set_rng_state(state)
    if not torch.allclose(long, short, rtol=1e-2, atol=1e-3):
        raise NotCausal(config.__name__)
    return model


def tiny_config(cls: type, variant: Mapping[str, object]) -> object:
    """A configuration of a class, every size small, one layer at least of each kind that its default has."""
    standard = cls()
    fields = _fields(cls)
    chosen = {name: value for name, value in {**SIZES, **variant}.items() if name in fields}
    kinds = list(dict.fromkeys(getattr(standard, "layer_types", None) or ()))
    layers = max(int(variant.get("layers", _LAYERS)), len(kinds))  # type: ignore[call-overload]
    for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
        if name in fields:
            chosen[name] = layers
    depth = getattr(standard, "num_hidden_layers", None)
    for name in fields - set(chosen):
        value = getattr(standard, name, None)
        if isinstance(value, list) and len(value) == depth and not _is_fixed(cls, name):
            texts = [str(v) for v in value]
            picked = [value[texts.index(text)] for text in dict.fromkeys(texts)]
            chosen[name] = (picked * layers)[:layers] if name.endswith("types") else value[:layers]
    for name in variant.get("defaults", ()):  # type: ignore[attr-defined]
        chosen.pop(name, None)
    return cls(**chosen)


def _is_fixed(cls: type, name: str) -> bool:
    found = getattr(cls, name, None)
    return isinstance(found, property) and found.fset is None


def _fields(cls: type) -> set[str]:
    annotated = {name for base in cls.__mro__ for name in inspect.get_annotations(base)}
    return annotated | set(inspect.signature(cls).parameters) | set(getattr(cls, "attribute_map", {}))


def in_a_process(run: Callable[[], Any]) -> tuple[Any, str]:
    """What ``run`` gives, through JSON, in a process of its own with bounds on memory and time; None, and why, if it
    ends without.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
        signal.alarm(_SECONDS)
        try:
            said = [run(), ""]
        except BaseException as error:
            said = [None, f"{type(error).__name__}: {error}"]
        with os.fdopen(writer, "w") as pipe:
            json.dump(said, pipe)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    found, crash = json.loads(text) if text else (None, "the process was killed: memory or time")
    return found, crash
