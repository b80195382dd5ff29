"""``fold-constants`` computes once what weights alone decide, to the bit."""

from __future__ import annotations

import pytest
import torch

from mxfx.graph.execute import execute
from mxfx.graph.node import op_name, path_of
from mxfx.graph.program import Program
from mxfx.graph.tiny import tiny
from mxfx.graph.trace import trace
from mxfx.graph.verify import verify
from mxfx.passes import FoldConstants, Lower
from mxfx.rewrite import Rewriter, Selector, apply
from mxfx.rewrite.rewriter import clean
from tests.programs import RAISE, padded_batch, passed

pytestmark = pytest.mark.usefixtures("definitions")

WEIGHT = "model.layers.0.mlp.down_proj.weight"


def same(before: Program, after: Program) -> None:
    ids, mask, _ = padded_batch()
    assert torch.equal(execute(after, ids, None, mask), execute(before, ids, None, mask))
    verify(after)


def with_call(program: Program, target: object, *rest: object) -> Program:
    """The program, one of its linears reading its weight through a call."""
    rw = Rewriter(program.copy(), "test")
    linear = next(n for n in rw.program.nodes("linear") if path_of(n).endswith("layers.0.mlp.down_proj"))
    rw.set_operand(linear, 1, rw.call(target, linear.args[1], *rest, like=linear))
    clean(rw.program)
    return rw.program


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("family", ["gemma-tiny", "gemma3-tiny"])
def test_gains_of_norms_are_computed_once(family, dtype):
    program = trace(tiny(family, dtype=dtype))
    before = apply(Lower(), passed(program.twin(dtype) if dtype == torch.float64 else program, RAISE)).program
    applied = apply(FoldConstants(), before)
    assert {m.note for m in applied.record.matches} >= {"aten.add.Tensor"}
    assert not applied.record.skips
    folded = [name for name in applied.program.weights if name.startswith("folded.")]
    assert len(folded) == len(applied.record.matches)
    assert not apply(FoldConstants(), applied.program).record.matches
    same(before, applied.program)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_quantizer_of_a_weight_and_casts_of_both_roles_fold(dtype):
    plain = passed(trace(tiny("llama-tiny", dtype=dtype)), RAISE)
    before = with_call(plain, torch.ops.mxfx.fake_quantize.default, "mxint4@32", -1)
    after = apply(FoldConstants(), before).program
    assert not list(after.nodes("fake_quantize"))
    assert WEIGHT not in after.weights
    same(before, after)
    before = with_call(with_call(plain, torch.ops.mxfx.cast.default, "model"), torch.ops.mxfx.cast.default, "compute")
    applied = apply(FoldConstants(), before)
    assert len(applied.record.matches) == 1, "a chain folds as a whole"
    verify(applied.program)


def test_what_inputs_decide_or_chance_stays():
    before = passed(trace(tiny("llama-tiny", dtype=torch.float32)), RAISE)
    assert not apply(FoldConstants(), before).record.matches
    random = with_call(before, torch.ops.aten.rand_like.default)
    assert not apply(FoldConstants(), random).record.matches


def test_a_result_that_takes_more_memory_than_it_saves_is_skipped():
    before = passed(trace(tiny("llama-tiny", dtype=torch.float32)), RAISE)
    larger = with_call(with_call(before, torch.ops.aten.repeat.default, [1, 2]), torch.ops.aten.slice.Tensor, 1, 0, 96)
    applied = apply(FoldConstants(max_growth=-1), larger)
    [skip] = applied.record.skips
    assert "0 bytes more than its weights" in skip.reason
    assert len(apply(FoldConstants(max_growth=0), larger).record.matches) == 1
    assert not apply(FoldConstants(select=Selector("nothing")), larger).record.matches


def test_a_result_finer_than_the_store_keeps_is_skipped():
    before = apply(Lower(), passed(trace(tiny("gemma-tiny", dtype=torch.float64)), RAISE)).program
    applied = apply(FoldConstants(), before)
    assert not applied.record.matches
    assert "float64" in applied.record.skips[0].reason and "float32" in applied.record.skips[0].reason


def test_weights_without_data_stay_with_a_reason():
    before = with_call(passed(trace(tiny("llama-tiny").to("meta")), RAISE), torch.ops.aten.neg.default)
    applied = apply(FoldConstants(), before)
    assert "meta device" in applied.record.skips[0].reason
    assert [op_name(n) for n in applied.program.graph.nodes if op_name(n) == "aten.neg.default"]


def test_a_tied_weight_is_freed_only_where_nothing_reads_it_under_another_name():
    program = passed(trace(tiny("llama-tiny", dtype=torch.float32)), RAISE)
    rw = Rewriter(program.copy(), "test")
    head, embedding = list(rw.program.nodes("linear"))[-1], next(iter(rw.program.nodes("embedding")))
    read = str(embedding.args[0].target)
    (other,) = {"model.embed_tokens.weight", "lm_head.weight"} - {read}
    tied = rw.weight(other, head)
    rw.set_operand(head, 1, rw.call(torch.ops.mxfx.fake_quantize.default, tied, "mxint4@32", like=head))
    clean(rw.program)
    assert rw.weights.canonical(other) == rw.weights.canonical(read)
    after = apply(FoldConstants(max_growth=0), rw.program)
    assert not after.record.matches
    assert "more than its weights" in after.record.skips[0].reason
