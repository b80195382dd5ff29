"""Tiny random models of every family, for tests, ``mxfx opt`` and examples: no download, a second to trace."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from mxfx.ground.nearest import did_you_mean

_COMMON: dict[str, object] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.1,
}

#: Name → configuration class of transformers and what it adds to the common sizes.
FAMILIES: Mapping[str, tuple[str, Mapping[str, object]]] = {
    "llama-tiny": ("LlamaConfig", {"tie_word_embeddings": True}),
    "qwen2-tiny": ("Qwen2Config", {"tie_word_embeddings": False}),
    "qwen3-tiny": ("Qwen3Config", {"tie_word_embeddings": True}),
    "mistral-tiny": ("MistralConfig", {"sliding_window": 5}),
    "gemma-tiny": ("GemmaConfig", {}),
    "gemma3-tiny": ("Gemma3TextConfig", {"sliding_window": 5}),
    "phi3-tiny": ("Phi3Config", {}),
    "smollm3-tiny": ("SmolLM3Config", {}),
    "olmo2-tiny": ("Olmo2Config", {}),
    "granite-tiny": ("GraniteConfig", {}),
}


def tiny(
    name: str, *, layers: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32, **config: object
) -> nn.Module:
    """A random causal LM of a family, in eval mode; the same seed gives the same weights.

    Nothing in it is neutral, so that no rewrite can be wrong unseen: norm gains differ from 1, biases from 0, and the
    mean of the embeddings is not zero. ``config`` overrides entries of the configuration.

    Raises ``ValueError`` for a name that is not in ``FAMILIES``.
    """
    import transformers

    if name not in FAMILIES:
        raise ValueError(f"no built-in model {name!r} (there are {', '.join(FAMILIES)}) {did_you_mean(name, FAMILIES)}")
    class_name, extra = FAMILIES[name]
    given = {**_COMMON, **extra, "num_hidden_layers": layers, **config}
    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, class_name)(**given))
        shaken(model)
    finally:
        torch.random.set_rng_state(state)
    model.config.name_or_path = name
    return model.to(dtype).eval()


def shaken(model: nn.Module) -> nn.Module:
    """The same model with gains other than 1, biases other than 0 and embeddings with a mean: nothing is neutral."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
        model.get_input_embeddings().weight.add_(0.05)
    return model
