"""GPTQ of stacked experts: each as if it stood alone; what calibration hardly reached falls back."""

from __future__ import annotations

import pytest
import torch

from mxfx.algorithms import gptq_experts as module
from mxfx.algorithms.gptq import asymmetric_target
from mxfx.algorithms.gptq_experts import gptq_experts
from mxfx.formats import parse
from tests.algorithms.one_weight import gptq

FORMAT = parse("mxint4@32")
HITS = (400, 3, 250, 0)


def _problem() -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 24, 64, generator=generator)
    mixing = torch.randn(64, 64, generator=generator)
    rows = [torch.randn(hits, 64, generator=generator) @ mixing for hits in HITS]
    return weight, torch.stack([x.mT @ x for x in rows]), rows


@pytest.mark.parametrize("batch", [1 << 40, 1], ids=["one batch", "one by one"])
def test_each_expert_is_solved_with_the_hessian_of_its_tokens(monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    monkeypatch.setattr(module, "SOLVED_AT_ONCE", {"cpu": batch})
    weight, hessian, _ = _problem()
    found = list(gptq_experts(weight, hessian, HITS, FORMAT, fewest=1, refine=1))
    for expert in range(3):
        alone = gptq(weight[expert], hessian[expert], FORMAT, refine=1)
        assert found[expert].basis == "own"
        assert torch.equal(found[expert].solved.weight, alone.weight)
        assert found[expert].solved.loss == pytest.approx(alone.loss, rel=1e-6)


def test_an_expert_with_few_tokens_takes_the_hessian_of_all() -> None:
    weight, hessian, rows = _problem()
    every = torch.cat(rows)
    shared = every.mT @ every
    found = list(gptq_experts(weight, hessian, HITS, FORMAT, fewest=32, shared=shared, shared_rows=len(every)))
    assert [one.basis for one in found] == ["own", "shared", "own", "shared"]
    for expert in (1, 3):
        assert torch.equal(found[expert].solved.weight, gptq(weight[expert], shared, FORMAT).weight)


@pytest.mark.parametrize("rows", [0, 31])
def test_where_all_tokens_are_too_few_it_is_rounded_to_nearest(rows: int) -> None:
    weight, hessian, _ = _problem()
    shared = None if rows == 0 else hessian.sum(0)
    found = list(gptq_experts(weight, hessian, HITS, FORMAT, fewest=32, shared=shared, shared_rows=rows))
    assert [one.basis for one in found] == ["own", "nearest", "own", "nearest"]
    for expert in (1, 3):
        assert torch.equal(found[expert].solved.weight, FORMAT.fake_quantize(weight[expert]))


def test_targets_move_where_the_hessian_is_the_experts_own() -> None:
    weight, hessian, rows = _problem()
    every = torch.cat(rows)
    shared, cross = every.mT @ every, 0.9 * hessian
    found = list(
        gptq_experts(
            weight, hessian, HITS, FORMAT, fewest=32, shared=shared, shared_rows=len(every), cross=cross, asymmetric=0.5
        )
    )
    moved = asymmetric_target(weight[0], hessian[0], cross[0], 0.5, 0.1)
    assert torch.equal(found[0].solved.weight, gptq(weight[0], hessian[0], FORMAT, target=moved).weight)
    assert torch.equal(found[1].solved.weight, gptq(weight[1], shared, FORMAT).weight)
