"""Our configurations, as they are, on mixtures of experts: they run, and every expert is in few bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mxfx.config.overrides import apply_overrides
from mxfx.config.pipeline import load
from mxfx.graph.node import info
from mxfx.graph.verify import verify
from mxfx.pipeline.manager import PassManager, PipelineResult
from mxfx.rewrite import Context
from mxfx.rewrite.operands import is_rounded
from mxfx.rewrite.size import inner, multiplied, share_in_format
from tests.mixtures import MIXTURES, traced_mixture

_CONFIGS = Path(__file__).parents[2] / "passes_configs"
_RUNS: dict[str, tuple[str, ...]] = {
    "rtn_w4a4kv4": (),
    "gptq_w4a4kv4": ("pass.gptq.refine=0", "pass.gptq.min_expert_tokens=8"),
    "best_w4a4kv4": ("pass.distill.steps=2", "pass.distill.batch_size=2"),
}
_TOKENS = torch.randint(3, 128, (8, 32), generator=torch.Generator().manual_seed(5))
#: Run by default: transposed weights with biases, and shared experts.
_SHORT = ("gpt_oss", "qwen2_moe")


def _run(name: str, config: str) -> PipelineResult:
    pipeline = apply_overrides(load(_CONFIGS / f"{config}.toml"), _RUNS[config]).completed()
    return PassManager().run(traced_mixture(name), pipeline, Context(tokens=lambda: _TOKENS))


@pytest.mark.parametrize("config", _RUNS)
@pytest.mark.parametrize(
    "name", [name if name in _SHORT else pytest.param(name, marks=pytest.mark.thorough) for name in MIXTURES]
)
def test_every_weight_that_a_layer_multiplies_by_is_in_few_bits(name: str, config: str) -> None:
    program = _run(name, config).program
    verify(program)
    weights = multiplied(program)
    assert share_in_format(inner(weights)) > 0.98
    assert all(is_rounded(one.node, "weight") for one in weights if one.format is not None)
    # The router and the head alone stay float: nine tenths of a real model's weights are none of them.
    assert {one.role for one in weights if one.format is None} <= {"router", "head", ""}
    stacks = list(program.nodes("expert_linear"))
    assert stacks and all({"weight", "input"} <= set(info(n).formats) for n in stacks)
