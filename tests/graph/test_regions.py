"""Regions are found by dataflow: the same answers for every spelling of a family, reasons where one is refused."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import fx

from mxfx.graph.node import path_of
from mxfx.graph.program import Program
from mxfx.graph.regions import (
    Features,
    GatedRegion,
    Refusal,
    ValueRegion,
    features,
    gated_regions,
    residual_regions,
    rotary_region,
    siblings,
    value_region,
)
from mxfx.graph.tiny import tiny
from mxfx.graph.trace import trace
from mxfx.passes import FuseNorm, RaiseAttention, RaiseNorm, RaiseRope
from mxfx.rewrite import apply


@cache
def raised(family: str) -> Program:
    program = trace(tiny(family))
    for raising in (RaiseNorm(), RaiseRope(), RaiseAttention()):
        program = apply(raising, program).program
    return program


def leaf(node: fx.Node) -> str:
    return path_of(node).rsplit(".", 1)[-1]


@pytest.mark.parametrize(
    "family", ["llama-tiny", "qwen2-tiny", "qwen3-tiny", "mistral-tiny", "gemma-tiny", "granite-tiny"]
)
def test_the_residual_axis_joins_embedding_writers_readers_and_norms(family):
    (region,) = residual_regions(apply(FuseNorm(), raised(family)).program)
    assert region.width == 64
    assert len(region.embeddings) == 1
    assert sorted(map(leaf, region.writers)) == ["down_proj", "down_proj", "o_proj", "o_proj"]
    assert sorted(map(leaf, region.readers)) == ["gate_proj"] * 2 + ["k_proj"] * 2 + ["lm_head"] + [
        name for name in ("q_proj", "up_proj", "v_proj") for _ in range(2)
    ]
    assert len(region.norms) == 5
    assert region.refusals == ()


def test_a_gain_on_the_residual_axis_refuses_it():
    (region,) = residual_regions(raised("llama-tiny"))
    assert len(region.refusals) == 5
    assert "has a gain" in region.refusals[0].reason


def test_norms_behind_linears_belong_to_the_residual_axis():
    (region,) = residual_regions(apply(FuseNorm(), raised("olmo2-tiny")).program)
    assert {leaf(r.node) for r in region.refusals} == {"post_attention_layernorm", "post_feedforward_layernorm"}


def test_reading_single_channels_refuses_the_axis():
    program = apply(FuseNorm(), raised("llama-tiny")).program
    add = next(n for n in program.graph.nodes if n.target is torch.ops.aten.add.Tensor)
    with program.graph.inserting_after(add):
        part = program.graph.call_function(torch.ops.aten.relu.default, (add,))
    part.meta["val"] = add.meta["val"]
    (region,) = residual_regions(program)
    assert any(r.node is part and "relu" in r.reason for r in region.refusals)


def test_features_follow_data_movement_of_fused_projections():
    program = raised("phi3-tiny")
    value = next(program.nodes("attention")).args[2]
    found = features(value)
    assert isinstance(found, Features)
    assert leaf(found.source) == "qkv_proj"
    assert torch.equal(found.index, torch.arange(96, 128).reshape(2, 16))


@pytest.mark.parametrize(
    "family", ["llama-tiny", "qwen2-tiny", "gemma3-tiny", "phi3-tiny", "olmo2-tiny", "granite-tiny"]
)
def test_values_run_from_one_linear_to_one_linear(family):
    region = value_region(next(raised(family).nodes("attention")))
    assert isinstance(region, ValueRegion)
    assert region.rows.shape == (2, 16)
    assert region.columns.tolist() == torch.arange(64).reshape(4, 16).tolist()
    assert region.group == 2


def test_values_that_somebody_else_reads_are_refused():
    program = raised("llama-tiny").copy()
    attention = next(program.nodes("attention"))
    with program.graph.inserting_after(attention.args[2]):
        spy = program.graph.call_function(torch.ops.aten.relu.default, (attention.args[2],))
    spy.meta["val"] = attention.args[2].meta["val"]
    found = value_region(attention)
    assert isinstance(found, Refusal)
    assert "reads transpose" in found.reason


@pytest.mark.parametrize("family", ["qwen3-tiny", "gemma3-tiny", "olmo2-tiny"])
def test_a_norm_between_linear_and_rope_refuses_the_diagonal(family):
    found = rotary_region(next(raised(family).nodes("attention")))
    assert isinstance(found, Refusal)
    assert "rms_norm" in found.reason


@pytest.mark.parametrize("family", ["llama-tiny", "qwen2-tiny", "gemma3-tiny", "phi3-tiny"])
def test_gated_activations_tell_the_scaled_factor_from_the_gate(family):
    regions = list(gated_regions(raised(family)))
    assert len(regions) == 2
    for region in regions:
        assert isinstance(region, GatedRegion)
        assert region.width == 96
        assert [leaf(w.linear) for w in region.scaled] == ["gate_up_proj" if family == "phi3-tiny" else "up_proj"]
        assert [leaf(w.linear) for w in region.gates] == ["gate_up_proj" if family == "phi3-tiny" else "gate_proj"]
        assert [leaf(r) for r in region.readers] == ["down_proj"]


def test_siblings_read_one_tensor():
    groups = [sorted(map(leaf, linears)) for linears in siblings(raised("llama-tiny")).values()]
    layer = [["k_proj", "q_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert groups == [*layer, *layer, ["lm_head"]]
