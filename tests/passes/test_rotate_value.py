"""``rotate-value`` rotates values per key-value head by weights alone."""

from __future__ import annotations

import pytest
import torch

from mxfx.graph.execute import execute
from mxfx.ops.catalogue import spec
from mxfx.passes import RotateValue, TransformKv
from mxfx.rewrite import FactError, Selector, apply
from mxfx.rewrite.facts import VALUES_ROTATED


@pytest.mark.parametrize(
    "family",
    [
        "llama-tiny",
        "qwen2-tiny",
        "qwen3-tiny",
        "mistral-tiny",
        "gemma-tiny",
        "gemma3-tiny",
        "phi3-tiny",
        "olmo2-tiny",
        "granite-tiny",
    ],
)
@pytest.mark.parametrize("block", [0, 8])
def test_logits_stay_and_no_node_is_added(family, block, raised, preserved):
    before = raised(family)
    program, record = preserved(RotateValue(block=block), before)
    assert len(record.matches) == 2
    assert len(program.graph.nodes) == len(before.graph.nodes)


def test_attention_reads_rotated_values(raised, ctx):
    before = raised("qwen2-tiny")
    after = apply(RotateValue(signs=False), before, ctx).program

    def values(program):
        seen = []

        def observe(node, value):
            if node is next(iter(program.nodes("attention"))).args[2]:
                seen.append(value)
            return value

        execute(program, torch.arange(3, 20)[None], observe=observe)
        return seen[0]

    old, new = values(before), values(after)
    torch.testing.assert_close(new.norm(dim=-1), old.norm(dim=-1))
    assert (new - old).abs().max() > 0.1


def test_select_limits_the_layers(raised, preserved):
    _, record = preserved(RotateValue(select=Selector(r"model\.layers\.1\..*")), raised("llama-tiny"))
    assert [m.path for m in record.matches] == ["model.layers.1.self_attn"]


def test_a_block_that_does_not_divide_the_head_becomes_one_that_does_or_is_refused(raised, preserved):
    _, record = preserved(RotateValue(block=24), raised("llama-tiny"))
    assert record.matches[0].note.endswith(", order 8 (24 does not divide 16)")
    refused = apply(RotateValue(block=12), raised("llama-tiny")).record
    assert {skip.reason for skip in refused.skips} == {"no Hadamard matrix of order 12 fits the head dimension 16"}


def test_the_fact_fails_where_one_side_was_turned_alone(raised) -> None:
    program = raised("llama-tiny").copy()
    assert VALUES_ROTATED.check(program) is None
    name = "model.layers.0.self_attn.v_proj.weight"
    program.weights.set(name, program.weights[name].flip(0), RotateValue.name)
    assert "v_proj 1 times, model.layers.0.self_attn.o_proj 0 times" in str(VALUES_ROTATED.check(program))


def test_a_pass_that_transforms_keys_alone_breaks_its_promise(raised, monkeypatch) -> None:
    def keys_alone(self, rw, attention, moments, gradients) -> None:
        k = spec(attention).get("k")
        spec(attention).set(rw, "k", rw.call(torch.ops.mxfx.hadamard.default, k, 8, like=attention))

    monkeypatch.setattr(TransformKv, "_keys", keys_alone)
    with pytest.raises(FactError, match=r"the keys of model.layers.0.self_attn are transformed alone"):
        apply(TransformKv(values=False, block=8), raised("llama-tiny"))
