"""``rotate-residual`` changes the basis of the residual stream and nothing else."""

from __future__ import annotations

import pytest
import torch

from mxfx.passes import FuseNorm, RotateResidual
from mxfx.rewrite import FactError, apply


@pytest.mark.parametrize(
    "family", ["llama-tiny", "qwen2-tiny", "qwen3-tiny", "mistral-tiny", "gemma-tiny", "phi3-tiny", "granite-tiny"]
)
@pytest.mark.parametrize("kind", ["hadamard", "block-hadamard"])
def test_logits_stay_while_every_residual_weight_changes(family, kind, raised, preserved):
    fused = apply(FuseNorm(), raised(family)).program
    program, record = preserved(RotateResidual(kind=kind, block=16), fused)
    assert len(record.matches) == 1
    assert {c.weight for c in program.weights.ledger if c.pass_name == "rotate-residual"} >= {
        program.weights.canonical(program.weight_of(n)) for n in program.nodes("embedding", "linear")
    }


@pytest.mark.parametrize("family", ["gemma3-tiny", "olmo2-tiny"])
def test_norms_before_the_residual_sum_are_a_reason_to_refuse(family, raised, preserved):
    fused = apply(FuseNorm(), raised(family)).program
    program, record = preserved(RotateResidual(block=16), fused)
    assert not record.matches
    assert "has a gain" in record.skips[0].reason
    assert all(torch.equal(program.weights[n], fused.weights[n]) for n in fused.weights)


def test_gains_must_be_fused_first(raised):
    with pytest.raises(FactError, match="norms-fused"):
        apply(RotateResidual(), raised("llama-tiny"))


def test_a_block_that_does_not_divide_the_axis_is_an_error(raised):
    fused = apply(FuseNorm(), raised("llama-tiny")).program
    with pytest.raises(ValueError, match="block = 48 does not divide the residual axis of 64"):
        apply(RotateResidual(block=48), fused)


def test_signs_follow_the_seed(raised, ctx):
    fused = apply(FuseNorm(), raised("llama-tiny")).program
    name = fused.weight_of(next(iter(fused.nodes("embedding"))))
    one, again = (apply(RotateResidual(block=16), fused, ctx).program.weights[name] for _ in range(2))
    ctx.seed = 2
    other = apply(RotateResidual(block=16), fused, ctx).program.weights[name]
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
