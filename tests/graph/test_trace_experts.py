"""Mixtures of experts at trace time: two expert linears a layer, whatever the layout of the model's weights."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from mxfx.graph.execute import execute
from mxfx.graph.module import build
from mxfx.graph.node import path_of
from mxfx.graph.trace import bind, trace
from mxfx.graph.verify import verify
from mxfx.passes import Lower, RaiseAttention, RaiseNorm, RaiseRope
from tests import architectures
from tests.mixtures import MIXTURES, mixture, traced_mixture
from tests.programs import RAISE, padded_batch, passed, relative
from tests.sweep import unseen

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 256, "num_local_experts": 4,
    "num_experts_per_tok": 2, "initializer_range": 0.1,
}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return transformers.GraniteMoeForCausalLM(transformers.GraniteMoeConfig(**SIZES)).eval()


def test_a_layer_of_experts_is_two_expert_linears_named_after_their_weights(model: nn.Module) -> None:
    program = trace(model)
    verify(program)
    assert [path_of(n) for n in program.nodes("expert_linear")] == [
        f"model.layers.{i}.block_sparse_moe.experts.{name}" for i in range(2) for name in ("gate_up_proj", "down_proj")
    ]


def test_the_lowered_program_says_what_the_model_says(model: nn.Module) -> None:
    lowered = passed(trace(model), (RaiseNorm(), RaiseRope(), RaiseAttention(), Lower()))
    verify(lowered)
    ids = torch.randint(3, 128, (2, 13), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert relative(build(lowered)(ids), model(input_ids=ids).logits) < 1e-6


class Transposed(nn.Module):
    """The experts of a model whose weights are kept as ``(experts, in, out)``, with biases."""

    def __init__(self, old: nn.Module) -> None:
        super().__init__()
        self.config, self.act_fn = old.config, old.act_fn
        self.has_gate, self.has_bias, self.has_post_expert_norm, self.is_transposed = True, True, False, True
        self._is_expert_parallel, self.num_experts = False, len(old.down_proj)
        self.gate_up_proj = nn.Parameter(old.gate_up_proj.detach().mT.contiguous())
        self.down_proj = nn.Parameter(old.down_proj.detach().mT.contiguous())
        self.gate_up_proj_bias = nn.Parameter(torch.randn(old.gate_up_proj.shape[:2]))
        self.down_proj_bias = nn.Parameter(torch.randn(old.down_proj.shape[:2]))

    def _apply_gate(self, both: torch.Tensor) -> torch.Tensor:
        return both[..., ::2].clamp(max=0.5) * (1 + both[..., 1::2])

    def forward(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        from transformers.integrations.moe import ExpertsInterface

        return ExpertsInterface().get_interface(self.config._experts_implementation, None)(self, x, index, weights)


def test_transposed_weights_are_stored_with_their_input_axis_last() -> None:
    torch.manual_seed(0)
    model = transformers.GraniteMoeForCausalLM(transformers.GraniteMoeConfig(**SIZES)).eval()
    for layer in model.model.layers:
        layer.block_sparse_moe.experts = Transposed(layer.block_sparse_moe.experts)
    model.set_experts_implementation("batched_mm")
    program = trace(model)
    verify(program)
    name = "model.layers.0.block_sparse_moe.experts.gate_up_proj"
    assert program.weights[f"{name}.mT"].shape == (4, 192, 64)
    assert program.weights[f"{name}.mT"].data_ptr() == model.get_parameter(name).data_ptr()
    assert name not in program.weights
    lowered = passed(trace(model), (RaiseNorm(), RaiseRope(), RaiseAttention(), Lower()))
    ids = torch.randint(3, 128, (2, 13), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert relative(build(lowered)(ids), model(input_ids=ids).logits) < 1e-6
    meta = trace(model.to("meta"))
    again = transformers.GraniteMoeForCausalLM(transformers.GraniteMoeConfig(**SIZES))
    for layer in again.model.layers:
        layer.block_sparse_moe.experts = Transposed(layer.block_sparse_moe.experts)
    assert bind(meta, again).weights[f"{name}.mT"].device.type == "cpu"


@pytest.mark.parametrize(
    "name",
    [n if n in ("llama4_text", "gpt_oss", "jetmoe") else pytest.param(n, marks=pytest.mark.thorough) for n in MIXTURES],
)
def test_every_layout_says_what_its_model_says(name: str) -> None:
    program = traced_mixture(name)
    stacked = {n for n in program.weights if program.weights[n].dim() == 3}
    assert stacked and stacked == {program.weight_of(n) for n in program.nodes("expert_linear")}
    lowered = passed(program, (*RAISE, Lower()))
    ids, mask, positions = padded_batch()
    with torch.no_grad():
        expected = mixture(name)(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        assert relative(build(lowered)(ids, positions, mask)[mask.bool()], expected[mask.bool()]) < 1e-5


def test_rows_that_the_data_cuts_by_expert_are_one_expert_linear() -> None:
    """No length in the program is a number that only the data knows, and experts without a token are none."""
    program = traced_mixture("jetmoe")
    assert [path_of(n) for n in program.nodes("expert_linear") if "layers.0" in path_of(n)] == [
        f"model.layers.0.{part}.weight"
        for part in (
            *("self_attention.experts.input_linear", "self_attention.experts.output_linear"),
            *("mlp.input_linear", "mlp.output_linear"),
        )
    ]
    assert not [n for n in program.nodes() if n.target is torch.ops.aten.item.default]
    verify(program)
    one = torch.tensor([[5]])
    with torch.no_grad():
        assert relative(execute(program, one), mixture("jetmoe")(input_ids=one).logits) < 1e-5


def test_a_batched_product_with_turned_weights_is_an_expert_linear_that_reads_them_as_they_are() -> None:
    program = trace(architectures.build("inkling_text"))
    shared = [path_of(n) for n in program.nodes("expert_linear") if "layers.1.mlp.shared" in path_of(n)]
    assert shared == [f"model.layers.1.mlp.shared_experts.{name}_proj" for name in ("gate", "up", "down")]
    assert {program.weight_of(n) for n in program.nodes("expert_linear")} >= set(shared)
    assert not unseen(program)


def test_a_matrix_a_head_on_the_left_of_a_product_is_an_expert_linear_too() -> None:
    model = architectures.build("zamba")
    program = trace(model)
    verify(program)
    stacks = [path_of(n) for n in program.nodes("expert_linear") if "layers.1" in path_of(n)]
    assert stacks == [f"model.layers.1.mamba.{name}_proj_weight" for name in ("x", "dt")]
    assert not unseen(program)
    ids = torch.randint(3, 128, (2, 13), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert relative(execute(program, ids), model(input_ids=ids, use_cache=False).logits) < 1e-5
