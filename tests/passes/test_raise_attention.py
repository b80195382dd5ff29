"""``raise-attention``: attention from the interface is counted, a model's own SDPA is rewritten, bits stay."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from mxfx.graph.execute import execute
from mxfx.graph.program import Program
from mxfx.graph.tiny import FAMILIES
from mxfx.passes import RaiseAttention, RaiseNorm, RaiseRope
from mxfx.rewrite import Context, FactError, Rewriter, apply
from mxfx.rewrite.rewriter import clean
from tests.filecheck import check_printed
from tests.programs import padded_batch, passed, raised, traced

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default


def before() -> Program:
    return passed(traced("llama-tiny"), (RaiseNorm(), RaiseRope()))


def with_own_attention(*, additive: bool = False, dropout: float = 0.0, scale: float | None = 0.25) -> Program:
    """As a model spells it that knows no interface: heads repeated by hand, then SDPA."""
    program = before().copy()
    program.facts -= {"raised", "attention-raised"}
    rw = Rewriter(program, "test")
    for node in program.nodes("attention"):
        q, k, v = node.args[:3]
        repeated = [_repeat(rw, source, node) for source in (k, v)]
        mask = rw.call(aten.mul.Tensor, q, 0.0, like=node) if additive else None
        own = rw.call(SDPA, q, *repeated, mask, dropout, not additive, scale=scale, like=node, val=node.meta["val"])
        rw.replace(node, own)
    clean(program)
    return program


def _repeat(rw: Rewriter, source: fx.Node, like: fx.Node) -> fx.Node:
    _, heads, _, dim = source.meta["val"].shape
    sizes = [n for n in rw.graph.nodes if n.target is aten.sym_size.int][:2]
    wide = rw.call(aten.unsqueeze.default, source, 2, like=like)
    shape = [sizes[0], heads, 2, sizes[1], dim]
    spread = rw.call(aten.expand.default, wide, shape, like=like)
    return rw.call(aten.reshape.default, spread, [sizes[0], heads * 2, sizes[1], dim], like=like)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_traced_through_the_interface_is_counted(family: str) -> None:
    record = apply(RaiseAttention(), passed(traced(family), (RaiseNorm(), RaiseRope()))).record
    assert [m.path for m in record.matches] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert {m.note for m in record.matches} == {"traced through the attention interface"}


def test_a_model_s_own_sdpa_is_raised_with_its_heads_unrepeated_and_no_bit_changes() -> None:
    program = with_own_attention()
    applied = apply(RaiseAttention(), program)
    ids, _, _ = padded_batch()
    assert torch.equal(execute(applied.program, ids), execute(program, ids))
    check_printed(
        applied.program,
        """
        CHECK: %[[Q:.+]] = mxfx.rope({{.*}}bf16[batch, 4, seq, 16]
        CHECK: %[[K:.+]] = mxfx.rope({{.*}}bf16[batch, 2, seq, 16]
        CHECK: mxfx.attention(%[[Q]], %[[K]], %transpose_2, None, 0.25, True)
        CHECK-NOT: scaled_dot_product_attention
        CHECK-NOT: aten.expand
        CHECK: return
        """,
    )


def test_the_scale_that_sdpa_takes_by_default_is_written_out() -> None:
    program = apply(RaiseAttention(), with_own_attention(scale=None)).program
    assert {n.args[4] for n in program.nodes("attention")} == {16**-0.5}


@pytest.mark.parametrize(
    ("given", "reason"), [({"additive": True}, "its mask is additive"), ({"dropout": 0.1}, "dropout 0.1")]
)
def test_attention_that_the_dialect_cannot_express_is_skipped_with_the_reason(given: dict, reason: str) -> None:
    program = with_own_attention(**given)
    rw = Rewriter(program.copy(), "raise-attention")
    RaiseAttention().run(rw, Context())
    assert rw.record.matches == [] and len(rw.record.skips) == 2
    assert all(reason in skip.reason for skip in rw.record.skips)


def test_the_other_raise_passes_come_first() -> None:
    with pytest.raises(FactError, match="requires 'norms-raised'"):
        apply(RaiseAttention(), traced("llama-tiny"))


def test_afterwards_the_program_counts_as_raised() -> None:
    assert {"norms-raised", "ropes-raised", "attention-raised", "raised"} <= raised("llama-tiny").facts
