"""``fuse-norm`` folds gains into linears and changes nothing that the model computes."""

from __future__ import annotations

import pytest
import torch

from mxfx.graph.module import build
from mxfx.graph.node import path_of
from mxfx.passes import FuseNorm, Lower
from mxfx.rewrite import FactError, Selector, apply
from tests.mixtures import raised_mixture
from tests.programs import passed

#: Family → norms that a layer of it can give away (OLMo 2 normalizes behind its linears).
FUSED_PER_LAYER = {
    "llama-tiny": 2, "qwen2-tiny": 2, "qwen3-tiny": 2, "mistral-tiny": 2, "gemma-tiny": 2,
    "gemma3-tiny": 2, "phi3-tiny": 2, "smollm3-tiny": 2, "olmo2-tiny": 0, "granite-tiny": 2,
}  # fmt: skip


@pytest.mark.parametrize("family", FUSED_PER_LAYER)
def test_every_norm_that_only_linears_read_loses_its_gain(family, raised, preserved):
    program, record = preserved(FuseNorm(), raised(family))
    assert len(record.matches) == 2 * FUSED_PER_LAYER[family] + 1
    assert all(n.args[1] is None for n in program.nodes("rms_norm") if path_of(n) in {m.path for m in record.matches})


def test_a_tied_head_is_untied_and_the_embedding_keeps_its_values(raised, preserved):
    before = raised("llama-tiny")
    program, _ = preserved(FuseNorm(), before)
    (embedding,) = program.nodes("embedding")
    head = [n for n in program.nodes("linear")][-1]
    name, head_name = program.weight_of(embedding), program.weight_of(head)
    assert program.weights.canonical(name) != program.weights.canonical(head_name)
    assert torch.equal(program.weights[name], before.weights[name])
    assert not torch.equal(program.weights[head_name], before.weights[head_name])


def test_a_shift_that_stacked_experts_take_in_is_stored_beside_them_and_not_under_them():
    before = raised_mixture("phimoe")
    program = apply(FuseNorm(), before).program
    added = {name for name in program.weights if name not in before.weights and "experts" in name}
    assert added == {f"model.layers.{layer}.mlp.experts.gate_up_proj_bias" for layer in range(2)}
    module = build(passed(program, (Lower(),)))
    assert {name for name, _ in module.named_parameters()} >= added


def test_query_and_key_norms_keep_their_gain_with_a_reason(raised, preserved):
    _, record = preserved(FuseNorm(), raised("qwen3-tiny"))
    assert {s.path.rsplit(".", 1)[-1] for s in record.skips} == {"q_norm", "k_norm"}
    assert all("no linear" in s.reason for s in record.skips)


def test_a_partial_selection_does_not_provide_the_fact(raised):
    with pytest.raises(FactError, match="still has a gain"):
        apply(FuseNorm(select=Selector(r"model\.layers\.0\..*")), raised("llama-tiny"))
