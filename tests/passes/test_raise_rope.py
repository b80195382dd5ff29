"""``raise-rope`` finds every rotary embedding, however it is spelled, and changes no bit."""

from __future__ import annotations

import pytest
import torch

from mxfx.graph.execute import execute
from mxfx.graph.node import path_of
from mxfx.graph.tiny import FAMILIES, tiny
from mxfx.graph.trace import trace
from mxfx.passes import RaiseRope
from mxfx.rewrite import apply, find_fact
from tests.filecheck import check_printed
from tests.programs import padded_batch, traced

aten = torch.ops.aten


@pytest.mark.parametrize("family", FAMILIES)
def test_queries_and_keys_of_every_layer_are_rotated_by_one_node_and_no_bit_changes(family: str) -> None:
    applied = apply(RaiseRope(), traced(family))
    ropes = list(applied.program.nodes("rope"))
    assert [path_of(n) for n in ropes] == [f"model.layers.{i}.self_attn" for i in (0, 0, 1, 1)]
    assert len(applied.record.matches) == 4 and applied.record.skips == []
    ids, mask, _ = padded_batch()
    assert torch.equal(execute(applied.program, ids, None, mask), execute(traced(family), ids, None, mask))


def test_the_graph_reads_tables_that_all_layers_share() -> None:
    check_printed(
        apply(RaiseRope(), traced("llama-tiny")).program,
        """
        CHECK: %[[COS:.+]] = mxfx.cast(%mul_1, "model")
        CHECK: %[[SIN:.+]] = mxfx.cast(%mul_2, "model")
        CHECK: %[[Q:.+]] = mxfx.rope(%{{.+}}, %[[COS]], %[[SIN]]) : bf16[batch, 4, seq, 16]
        CHECK: %[[K:.+]] = mxfx.rope(%{{.+}}, %[[COS]], %[[SIN]]) : bf16[batch, 2, seq, 16]
        CHECK: mxfx.attention(%[[Q]], %[[K]],
        CHECK: mxfx.rope(%{{.+}}, %[[COS]], %[[SIN]])
        CHECK-NOT: aten.neg
        CHECK: return
        """,
    )


def test_a_split_that_is_not_in_the_middle_is_skipped_with_the_reason() -> None:
    program = traced("llama-tiny").copy()
    moved = [n for n in program.graph.nodes if n.target is aten.slice.Tensor][:2]
    for node in moved:
        node.args = tuple({8: 6}.get(a, a) for a in node.args)
    record = apply(RaiseRope(), program).record
    assert len(record.matches) == 3
    (skip,) = record.skips
    assert "turns no channels of transpose" in skip.reason


def test_at_a_limit_the_fact_does_not_hold() -> None:
    applied = apply(RaiseRope(), traced("llama-tiny"), limit=3)
    assert "still spells out a rotary embedding" in str(find_fact("ropes-raised").check(applied.program))


def test_partial_rotation_rotates_the_sliced_channels_alone() -> None:
    hf = tiny("phi3-tiny", partial_rotary_factor=0.5)
    applied = apply(RaiseRope(), trace(hf))
    assert {n.meta["val"].shape[-1] for n in applied.program.nodes("rope")} == {8}
    ids, _, _ = padded_batch()
    with torch.no_grad():
        assert torch.equal(execute(applied.program, ids), hf(ids).logits)
