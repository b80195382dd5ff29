"""``rotate-qk`` rotates queries and keys alike behind RoPE."""

from __future__ import annotations

import pytest

from mxfx.graph.node import kind
from mxfx.passes import RotateQk


@pytest.mark.parametrize(
    "family",
    ["llama-tiny", "qwen2-tiny", "qwen3-tiny", "mistral-tiny", "gemma-tiny", "gemma3-tiny", "phi3-tiny", "olmo2-tiny"],
)
@pytest.mark.parametrize("block", [0, 8])
def test_scores_stay_and_keys_reach_attention_rotated(family, block, raised, preserved):
    program, record = preserved(RotateQk(block=block), raised(family))
    assert len(record.matches) == 2
    for attention in program.nodes("attention"):
        assert [kind(a) for a in attention.args[:2]] == ["hadamard", "hadamard"]
        assert attention.args[0].args[1] == (block or 16)


def test_a_block_that_does_not_fit_is_skipped_with_a_reason(raised, preserved):
    _program, record = preserved(RotateQk(block=12), raised("llama-tiny"))
    assert not record.matches
    assert "head dimension 16" in record.skips[0].reason
