"""``permute-channels`` reorders hidden channels and nothing else."""

from __future__ import annotations

import pytest
import torch

from mxfx.calibration.moments import block_moments
from mxfx.graph.node import path_of
from mxfx.passes import PermuteChannels


@pytest.mark.parametrize(
    "family", ["llama-tiny", "qwen2-tiny", "qwen3-tiny", "gemma-tiny", "gemma3-tiny", "phi3-tiny", "olmo2-tiny"]
)
def test_logits_stay(family, raised, preserved):
    _, record = preserved(PermuteChannels(), raised(family))
    assert len(record.matches) == 2


def test_blocks_share_the_energy_more_evenly(raised, preserved, ctx):
    def spread(program):
        down = next(n for n in program.nodes("linear") if path_of(n).endswith("down_proj"))
        energy = block_moments(program, {down.args[0]: 1}, ctx)[down.args[0]].reshape(-1, 32).sum(-1)
        return float(energy.max() / energy.min())

    before = raised("llama-tiny")
    after, _ = preserved(PermuteChannels(), before)
    assert spread(after) < spread(before)


def test_a_block_that_does_not_divide_is_skipped_with_a_reason(raised, preserved):
    before = raised("llama-tiny")
    program, record = preserved(PermuteChannels(block=64), before)
    assert "does not divide its 96 channels" in record.skips[0].reason
    assert all(torch.equal(program.weights[n], before.weights[n]) for n in before.weights)
