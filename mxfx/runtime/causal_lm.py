"""The emitted graph as a causal LM of transformers: logits, ``generate``, lm-eval."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from transformers import AutoConfig, GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from mxfx.graph.module import build
from mxfx.graph.program import Program
from mxfx.pipeline.emit import emitted


def emit(program: Program, device: torch.device | str = "cpu") -> fx.GraphModule:
    """Emit and build: ``gm(input_ids, position_ids=None, attention_mask=None)`` gives ``(batch, seq, vocabulary)``."""
    return build(emitted(program, device)).to(device)


def as_causal_lm(program: Program, device: torch.device | str = "cpu") -> EmittedCausalLM:
    """The program as a ``PreTrainedModel``: ``generate``, ``.logits``, ``HFLM(pretrained=…)``."""
    return EmittedCausalLM(_config(program), emit(program, device))


class EmittedCausalLM(PreTrainedModel, GenerationMixin):
    """Wraps an emitted ``GraphModule``. There is no cache: ``generate`` reads the whole prefix for every new token."""

    config_class = PreTrainedConfig
    main_input_name = "input_ids"
    base_model_prefix = "graph"
    _supports_cache_class = False

    def __init__(self, config: PreTrainedConfig, graph: fx.GraphModule) -> None:
        super().__init__(config)
        self.graph = graph
        self.generation_config = GenerationConfig.from_model_config(config)
        self.generation_config.use_cache = False
        self.eval()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **unused: Any,
    ) -> CausalLMOutputWithPast:
        """Logits ``(batch, seq, vocabulary)``, and the mean next-token loss where ``labels`` are given.

        Raises ``ValueError`` for a cache or embeddings as input: the graph takes ids.
        """
        for name in ("past_key_values", "inputs_embeds"):
            if unused.get(name) is not None:
                raise ValueError(f"an emitted graph takes input_ids; it cannot take {name}")
        logits = self.graph(input_ids, position_ids, attention_mask)
        loss = None if labels is None else self.loss_function(logits, labels, logits.shape[-1])
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **unused: Any
    ) -> dict:
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Weights come with the graph."""


def _config(program: Program) -> PreTrainedConfig:
    dropped = ("transformers_version", "_attn_implementation", "loss_type")
    values = {key: value for key, value in program.source.config.items() if key not in dropped}
    model_type = str(values.pop("model_type"))
    config = AutoConfig.for_model(model_type, **values)
    config.use_cache = False
    config.tie_word_embeddings = False
    return config
