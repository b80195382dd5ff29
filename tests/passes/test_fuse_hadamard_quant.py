"""``fuse-hadamard-quant`` makes one node of a transform and the quantizer that alone reads it."""

from __future__ import annotations

import pytest
import torch

from mxfx.formats import parse
from mxfx.graph.execute import execute
from mxfx.graph.tiny import tiny
from mxfx.graph.trace import trace
from mxfx.passes import Annotate, Distill, Gptq, InsertFakeQuant, Lower, QuantizeKvCache, Rule, TransformInputs
from mxfx.passes.fuse_hadamard_quant import FuseHadamardQuant
from mxfx.rewrite import Selector, apply
from mxfx.rewrite.facts import FactError
from tests.passes.fusing import EVERY_LINEAR, FORMAT, count, fused, quantized
from tests.programs import RAISE, passed


def test_each_transformed_input_and_key_becomes_one_node(raised, ctx):
    before = quantized(raised("llama-tiny"), ctx, transforms=True)
    after, record = fused(FuseHadamardQuant(), before, ctx)
    # Two layers: the inputs of q/k/v, o, gate/up and down, and the keys.
    assert len(record.matches) == count(after, "transform_quantize") == 2 * 5
    assert all(match.note == FORMAT for match in record.matches)


def test_queries_are_transformed_but_not_quantized_so_they_stay(raised, ctx):
    before = quantized(raised("llama-tiny"), ctx, transforms=True)
    after, record = fused(FuseHadamardQuant(), before, ctx)
    assert count(after, "hadamard") == 2
    assert len(record.skips) == 2
    assert all("quantizes nothing" in skip.reason for skip in record.skips)


def test_the_matrix_of_an_order_is_stored_once_and_its_signs_are_known(raised, ctx):
    before = quantized(raised("llama-tiny"), ctx, transforms=True)
    after, _ = fused(FuseHadamardQuant(), before, ctx)
    assert [name for name in after.weights if name.startswith("hadamard.")] == ["hadamard.16"]
    assert all(node.args[3] is True for node in after.nodes("transform_quantize"))


def test_a_matrix_that_is_no_hadamard_is_not_read_by_its_signs(ctx):
    program = passed(trace(tiny("llama-tiny")), RAISE)
    rule = Rule(Selector(EVERY_LINEAR), input=parse(FORMAT))
    for one in (TransformInputs(kind="wush", block=16), Annotate(rule=(rule,)), InsertFakeQuant()):
        program = apply(one, program, ctx).program
    after, _ = fused(FuseHadamardQuant(), program, ctx)
    assert [node.args[3:] for node in after.nodes("transform_quantize")] == [(False,)] * (2 * 4)


@pytest.mark.parametrize("late", [InsertFakeQuant(), QuantizeKvCache(), Gptq(), Distill()])
def test_passes_that_look_for_quantizers_come_before(raised, ctx, late):
    after, _ = fused(FuseHadamardQuant(), quantized(raised("llama-tiny"), ctx, transforms=True), ctx)
    with pytest.raises(FactError, match="quantizers-fused"):
        apply(late, after, ctx)
    with pytest.raises(ValueError, match=r"transform_quantize.* holds a quantizer.* fuse quantizers last"):
        execute(after, torch.ones(1, 4, dtype=torch.int64), quantize=False)


def test_without_transforms_there_is_nothing_to_fuse(raised, ctx):
    _, record = fused(FuseHadamardQuant(), quantized(raised("llama-tiny"), ctx, transforms=False), ctx)
    assert not record.matches and not record.skips


def test_an_order_beyond_one_product_has_an_op_without_a_matrix(ctx):
    sizes = {"hidden_size": 192, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    program = passed(trace(tiny("llama-tiny", dtype=torch.float64, head_dim=48, **sizes)).twin(torch.float64), RAISE)
    program = passed(
        program,
        (
            TransformInputs(block=0),
            Annotate(rule=(Rule(Selector(EVERY_LINEAR), input=parse(FORMAT)),)),
            InsertFakeQuant(),
        ),
    )
    after, record = fused(FuseHadamardQuant(), program, ctx)
    assert len(record.matches) == 2 * 4
    assert sorted({node.args[1] for node in after.nodes("hadamard_quantize")}) == [192, 256]
    assert not [name for name in after.weights if name.startswith("hadamard.")]
    # No kernel on a CPU: lower takes it apart again.
    lowered = apply(Lower(), after, ctx).program
    assert {"hadamard.192.left", "hadamard.256.right"} <= set(lowered.weights)
