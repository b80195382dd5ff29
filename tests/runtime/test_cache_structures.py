"""A cache for structures beside plain grouped heads: latent attention, soft caps, sinks, shared layers, experts."""

from __future__ import annotations

import pytest
import torch

from mxfx.config import Pipeline
from mxfx.graph.trace import trace
from mxfx.pipeline.manager import PassManager
from mxfx.runtime.causal_lm import EmittedCausalLM, as_causal_lm
from tests.architectures import build

#: Model type → what is special about its attention.
STRUCTURES = {
    "minicpm3": "latent: keys wider than values",
    "deepseek_v3": "latent, with experts",
    "gemma2": "soft caps, every other layer under a window",
    "gpt_oss": "sinks, every other layer under a window",
    "gemma3n_text": "layers that share keys and values",
    "qwen3_moe": "experts",
}


def both(name: str) -> tuple[torch.nn.Module, EmittedCausalLM]:
    model = build(name)
    program = PassManager().run(trace(model), Pipeline([]).completed()).program
    return model, as_causal_lm(program)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in ("gemma2", "gpt_oss") else pytest.mark.thorough) for name in STRUCTURES],
)
def test_greedy_tokens_are_those_of_transformers(name: str) -> None:
    model, lm = both(name)
    assert lm.specs
    ids = torch.randint(3, 128, (5, 20), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(20)[None] >= 3 * torch.arange(5)[:, None]).long()
    given = {"attention_mask": mask, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 30}
    assert torch.equal(lm.generate(ids * mask, **given), model.generate(ids * mask, **given))


def test_layers_without_a_window_have_no_ring() -> None:
    _, lm = both("gemma2")
    assert {spec.window for spec in lm.specs} == {8, None}
