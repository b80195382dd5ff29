"""``mxfx::expert_linear`` against a loop over tokens, with gradients, in every precision and layout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mxfx.ops import expert_linear

EXPERTS = torch.tensor([[3, 0], [0, 3], [3, 1], [1, 0], [0, 3]])  # expert 2 is never chosen


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def one_by_one(x: Tensor, weight: Tensor, experts: Tensor, bias: Tensor | None) -> Tensor:
    rows = []
    for token, chosen in enumerate(experts.tolist()):
        for place, expert in enumerate(chosen):
            row = x[token] if x.dim() == 2 else x[token, place]
            rows.append(weight[expert] @ row + (0 if bias is None else bias[expert]))
    return torch.stack(rows).unflatten(0, experts.shape)


@pytest.mark.parametrize("shape", [(5, 6), (5, 2, 6)], ids=["shared", "own"])
@pytest.mark.parametrize("biased", [False, True])
def test_each_token_goes_through_its_experts(shape: tuple[int, ...], biased: bool) -> None:
    x, weight, bias = randn(*shape), randn(4, 3, 6, seed=1), randn(4, 3, seed=2) if biased else None
    actual = torch.ops.mxfx.expert_linear(x, weight, EXPERTS, bias)
    assert torch.allclose(actual, one_by_one(x, weight, EXPERTS, bias), atol=1e-13)


@pytest.mark.parametrize("shape", [(5, 6), (5, 2, 6)], ids=["shared", "own"])
def test_gradients_reach_input_weights_and_biases(shape: tuple[int, ...]) -> None:
    leaves = [t.requires_grad_() for t in (randn(*shape), randn(4, 3, 6, seed=1), randn(4, 3, seed=2))]
    grad = randn(5, 2, 3, seed=3)
    x, weight, bias = leaves
    expected = torch.autograd.grad(one_by_one(x, weight, EXPERTS, bias), leaves, grad)
    for call in (expert_linear, torch.ops.mxfx.expert_linear):
        actual = torch.autograd.grad(call(x, weight, EXPERTS, bias), leaves, grad)
        assert all(torch.allclose(a, e, atol=1e-13) for a, e in zip(actual, expected, strict=True))
    assert not actual[1][2].any()


def test_bfloat16_rounds_once() -> None:
    x, weight = randn(5, 32, dtype=torch.bfloat16), randn(4, 16, 32, dtype=torch.bfloat16, seed=1)
    exact = one_by_one(x.double(), weight.double(), EXPERTS, None)
    assert torch.equal(torch.ops.mxfx.expert_linear(x, weight, EXPERTS), exact.bfloat16())


def test_a_transposed_view_is_a_weight_like_any_other() -> None:
    x, kept = randn(5, 6), randn(4, 6, 3, seed=1)
    actual = torch.ops.mxfx.expert_linear(x, kept.mT, EXPERTS)
    assert torch.allclose(actual, one_by_one(x, kept.mT, EXPERTS, None), atol=1e-13)


def test_operands_that_do_not_fit_are_refused_on_fake_tensors() -> None:
    x, weight = torch.empty(5, 6, device="meta"), torch.empty(4, 3, 7, device="meta")
    with pytest.raises(ValueError, match=r"\(experts, out, in\)"):
        torch.ops.mxfx.expert_linear(x, weight, EXPERTS.to("meta"))


class Layer(torch.nn.Module):
    def forward(self, x: Tensor, weight: Tensor, experts: Tensor, bias: Tensor) -> Tensor:
        return expert_linear(x, weight, experts, bias)


def test_its_definition_exports_with_a_dynamic_number_of_tokens() -> None:
    given = (randn(5, 6), randn(4, 3, 6, seed=1), EXPERTS, randn(4, 3, seed=2))
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    exported = torch.export.export(Layer(), given, dynamic_shapes=({0: tokens}, None, {0: tokens}, None))
    more = (randn(11, 6, seed=4), given[1], torch.randint(0, 4, (11, 2)), given[3])
    assert torch.allclose(exported.module()(*more), one_by_one(*more), atol=1e-13)
