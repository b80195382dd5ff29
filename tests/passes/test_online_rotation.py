"""``online-rotation``: rotate, quantize, rotate back."""

from __future__ import annotations

import pytest
import torch

from mxfx.formats import parse
from mxfx.graph.node import info, kind, path_of
from mxfx.passes import Annotate, InsertFakeQuant, OnlineRotation, Rule
from mxfx.rewrite import Selector, apply

INT4 = parse("mxint4@16")
LINEARS = Rule(Selector(r"model\.layers\..*_proj"), weight=INT4, input=INT4)
CACHE = Rule(Selector(r".*self_attn"), kv=INT4)


@pytest.mark.parametrize(
    "family", ["llama-tiny", "qwen2-tiny", "qwen3-tiny", "mistral-tiny", "gemma3-tiny", "olmo2-tiny"]
)
@pytest.mark.parametrize("block", [0, 16])
def test_without_a_quantizer_the_rotation_is_invisible(family, block, raised, preserved):
    annotated = apply(Annotate(rule=(LINEARS, CACHE)), raised(family)).program
    # 96 hidden channels of the tiny MLP take a Paley matrix that is not symmetric.
    _, record = preserved(OnlineRotation(sites=("linear", "kv_cache"), block=block), annotated)
    assert len(record.matches) == 2 * (7 + 2)


def test_the_quantizer_lands_between_the_rotations_and_weights_stay(raised, ctx):
    annotated = apply(Annotate(rule=(LINEARS,)), raised("llama-tiny")).program
    rotated = apply(OnlineRotation(), annotated, ctx).program
    program = apply(InsertFakeQuant(), rotated, ctx).program
    for linear in program.nodes("linear"):
        if path_of(linear) == "lm_head":
            continue
        back = linear.args[0]
        assert kind(back) in ("hadamard", "block_transform")
        assert kind(back.args[0]) == "fake_quantize"
        assert kind(back.args[0].args[0]) == "hadamard"
        assert "input" not in info(linear).formats
        name = program.weight_of(linear)
        assert torch.equal(program.weights[name], annotated.weights[name])


def test_siblings_share_one_rotation(raised, ctx):
    annotated = apply(Annotate(rule=(LINEARS,)), raised("llama-tiny")).program
    program = apply(OnlineRotation(select=Selector(r".*(q|k|v)_proj")), annotated, ctx).program
    assert sum("output" in info(n).formats for n in program.nodes("hadamard")) == 2


def test_operands_without_a_format_are_skipped(raised, preserved):
    annotated = apply(Annotate(rule=(CACHE,)), raised("llama-tiny")).program
    _, record = preserved(OnlineRotation(select=Selector(r"model\.layers\..*")), annotated)
    assert not record.matches
    assert len(record.skips) == 14
