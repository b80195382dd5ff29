"""``expand-attention`` spells attention out where operands inside it carry formats."""

from __future__ import annotations

import pytest
import torch

from mxfx.formats import parse
from mxfx.graph.execute import execute
from mxfx.graph.module import build
from mxfx.graph.node import op_name
from mxfx.passes import Annotate, ExpandAttention, InsertFakeQuant, Lower, Rule
from mxfx.rewrite import Selector, apply

INT8 = parse("mxint8@16")


def annotate(program, **formats):
    return apply(Annotate(rule=(Rule(Selector(r".*self_attn"), **formats),)), program).program


@pytest.mark.parametrize(
    "family", ["llama-tiny", "qwen2-tiny", "qwen3-tiny", "mistral-tiny", "gemma3-tiny", "phi3-tiny"]
)
def test_the_same_function_with_padding_windows_and_grouped_heads(family, raised, preserved):
    program, record = preserved(ExpandAttention(), annotate(raised(family), q=INT8, probs=INT8))
    assert len(record.matches) == 2
    assert not list(program.nodes("attention"))


def test_without_a_mask_too(raised):
    before = annotate(raised("llama-tiny"), probs=INT8)
    ids = torch.arange(3, 20)[None]
    torch.testing.assert_close(
        execute(apply(ExpandAttention(), before).program, ids), execute(before, ids), rtol=1e-9, atol=1e-9
    )


def test_it_lowers_and_runs(raised, ctx):
    expanded = apply(ExpandAttention(), annotate(raised("mistral-tiny"), probs=INT8)).program
    ids = torch.arange(3, 20)[None]
    lowered = apply(Lower(), expanded, ctx).program
    torch.testing.assert_close(build(lowered)(ids), execute(expanded, ids), rtol=1e-9, atol=1e-9)


def test_attention_with_plain_operands_stays_one_node(raised, preserved):
    program, record = preserved(ExpandAttention(), annotate(raised("llama-tiny"), kv=INT8))
    assert len(list(program.nodes("attention"))) == 2
    assert "neither queries" in record.skips[0].reason


def test_hidden_positions_keep_no_probability_and_set_no_scale(raised, ctx):
    coarse = parse("mxint4@16")
    before = annotate(raised("llama-tiny"), softmax=coarse, probs=coarse, q=coarse, kv=coarse)
    program = apply(InsertFakeQuant(), apply(ExpandAttention(), before).program).program
    assert sum(op_name(n) == "mxfx.fake_quantize.default" for n in program.graph.nodes) == 2 * 5
    ids = torch.randint(3, 128, (1, 20), generator=torch.Generator().manual_seed(3))
    other = ids.clone()
    other[:, 12:] = 7
    torch.testing.assert_close(execute(program, ids)[:, :12], execute(program, other)[:, :12], rtol=0, atol=0)
