"""``raise-norm`` finds every RMSNorm by dataflow and changes no bit of what the model computes."""

from __future__ import annotations

import pytest
import torch

from mxfx.graph.execute import execute
from mxfx.graph.node import path_of
from mxfx.graph.tiny import FAMILIES
from mxfx.passes import RaiseNorm
from mxfx.rewrite import Rewriter, apply, find_fact
from tests.filecheck import check_printed
from tests.programs import padded_batch, passed, raised, traced

aten = torch.ops.aten
#: Family → norms in two layers and the final one.
NORMS = {
    "llama-tiny": 5, "qwen2-tiny": 5, "qwen3-tiny": 9, "mistral-tiny": 5, "gemma-tiny": 5,
    "gemma3-tiny": 13, "phi3-tiny": 5, "smollm3-tiny": 5, "olmo2-tiny": 9, "granite-tiny": 5,
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_every_norm_becomes_one_node_and_no_bit_changes(family: str) -> None:
    applied = apply(RaiseNorm(), traced(family))
    assert len(applied.record.matches) == len(list(applied.program.nodes("rms_norm"))) == NORMS[family]
    assert not [n for n in applied.program.graph.nodes if n.target is aten.rsqrt.default]
    ids, mask, _ = padded_batch()
    assert torch.equal(execute(applied.program, ids, None, mask), execute(traced(family), ids, None, mask))


def test_the_gain_after_the_cast_is_llama_s() -> None:
    check_printed(
        apply(RaiseNorm(), traced("llama-tiny")).program,
        """
        CHECK: model.layers.0.input_layernorm:
        CHECK-NEXT: %[[N:.+]] = mxfx.rms_norm(%embedding, @model.layers.0.input_layernorm.weight, 1e-06, 0.0, False) {{.*}} <raise-norm>
        CHECK: aten.linear(%[[N]], @model.layers.0.self_attn.q_proj.weight)
        CHECK-NOT: aten.rsqrt
        CHECK: return
        """,  # noqa: E501
    )


def test_the_offset_gain_before_the_cast_is_gemma_s() -> None:
    check_printed(
        apply(RaiseNorm(), traced("gemma-tiny")).program,
        "CHECK: mxfx.rms_norm({{.*}}, @model.layers.0.input_layernorm.weight, 1e-06, 1.0, True)",
    )


def test_the_plain_gain_before_the_cast_is_olmo_s() -> None:
    check_printed(
        apply(RaiseNorm(), traced("olmo2-tiny")).program,
        "CHECK: mxfx.rms_norm({{.*}}, @model.layers.0.self_attn.q_norm.weight, 1e-05, 0.0, True)",
    )


def test_a_second_run_finds_nothing() -> None:
    once = apply(RaiseNorm(), traced("qwen3-tiny")).program
    assert apply(RaiseNorm(), once).record.matches == []


def test_at_a_limit_the_rest_stays_spelled_out() -> None:
    applied = apply(RaiseNorm(), traced("llama-tiny"), limit=2)
    assert [path_of(n) for n in applied.program.nodes("rms_norm")] == [
        "model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm",
    ]  # fmt: skip
    assert "still spells out an RMSNorm" in str(find_fact("norms-raised").check(applied.program))


def test_a_root_that_is_no_norm_is_skipped_with_the_nearest_reason() -> None:
    program = traced("llama-tiny").copy()
    rw = Rewriter(program, "test")
    mean = next(n for n in program.graph.nodes if n.target is aten.mean.dim)
    total = rw.call(aten.sum.dim_IntList, mean.args[0], [-1], True, like=mean)
    rw.replace(mean, total)
    record = apply(RaiseNorm(), program).record
    assert len(record.matches) == NORMS["llama-tiny"] - 1
    (skip,) = record.skips
    assert "no RMSNorm or LayerNorm: expected aten.mean.dim, found aten.sum.dim_IntList" in skip.reason
    assert skip.path == "model.layers.0.input_layernorm"


def test_a_norm_whose_inner_value_is_read_elsewhere_is_raised_and_the_value_stays() -> None:
    program = traced("llama-tiny").copy()
    rw = Rewriter(program, "test")
    root = next(n for n in program.graph.nodes if n.target is aten.rsqrt.default)
    (embedding,) = program.nodes("embedding")
    add = next(n for n in program.graph.nodes if n.target is aten.add.Tensor and embedding in n.args)
    narrow = rw.call(torch.ops.mxfx.cast.default, root, "model", like=root, after=root)
    scaled = rw.call(aten.mul.Tensor, add, narrow, like=add, after=add)
    rw.replace(add, scaled)
    ids, _, _ = padded_batch()
    applied = passed(program, [RaiseNorm()])
    assert torch.equal(execute(applied, ids), execute(program, ids))
    assert len(list(applied.nodes("rms_norm"))) == NORMS["llama-tiny"]


def test_layers_are_named_by_the_path_of_the_norm() -> None:
    assert {path_of(n) for n in raised("llama-tiny").nodes("rms_norm")} == {
        *(f"model.layers.{i}.{n}_layernorm" for i in (0, 1) for n in ("input", "post_attention")), "model.norm",
    }  # fmt: skip
