"""``insert-fake-quant`` rounds each annotated activation once per format, however many nodes read it."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from mxfx.formats import parse
from mxfx.graph.execute import execute
from mxfx.graph.node import path_of
from mxfx.graph.program import Program
from mxfx.graph.verify import verify
from mxfx.passes import Annotate, InsertFakeQuant, Rule
from mxfx.rewrite import FactError, Selector, apply
from mxfx.rewrite.facts import ACTIVATIONS_QUANTIZED
from tests.filecheck import check_printed
from tests.programs import MLP, QKVO, padded_batch, raised

M4, M8 = parse("mxint4@32"), parse("mxint8@32")


def annotated(*rules: Rule, family: str = "llama-tiny") -> Program:
    return apply(Annotate(rule=rules), raised(family)).program


def quantized(*rules: Rule, family: str = "llama-tiny") -> Program:
    return apply(InsertFakeQuant(), annotated(*rules, family=family)).program


def test_linears_that_share_an_input_share_its_quantizer() -> None:
    check_printed(
        quantized(Rule(Selector(QKVO), input=M4), Rule(Selector(MLP), input=M4)),
        """
        CHECK: %[[N:.+]] = mxfx.rms_norm(
        CHECK-NEXT: %[[A:.+]] = mxfx.fake_quantize(%[[N]], "mxint4@32", -1) {{.*}} <insert-fake-quant>
        CHECK: aten.linear(%[[A]], @model.layers.0.self_attn.q_proj.weight)
        CHECK: aten.linear(%[[A]], @model.layers.0.self_attn.k_proj.weight)
        CHECK: aten.linear(%[[A]], @model.layers.0.self_attn.v_proj.weight)
        CHECK: %[[B:.+]] = mxfx.fake_quantize(%reshape
        CHECK: aten.linear(%[[B]], @model.layers.0.self_attn.o_proj.weight)
        CHECK: %[[C:.+]] = mxfx.fake_quantize(
        CHECK: aten.linear(%[[C]], @model.layers.0.mlp.gate_proj.weight)
        CHECK: aten.linear(%[[C]], @model.layers.0.mlp.up_proj.weight)
        CHECK: %[[D:.+]] = mxfx.fake_quantize(
        CHECK: aten.linear(%[[D]], @model.layers.0.mlp.down_proj.weight)
        """,
    )


def test_seven_linears_a_layer_need_four_quantizers() -> None:
    program = quantized(Rule(Selector(QKVO), input=M4), Rule(Selector(MLP), input=M4))
    counted = Counter(path_of(n).split(".")[2] for n in program.nodes("fake_quantize"))
    assert counted == {"0": 4, "1": 4}


def test_every_reader_is_a_match_even_where_the_quantizer_is_shared() -> None:
    applied = apply(InsertFakeQuant(), annotated(Rule(Selector(QKVO), input=M4)))
    assert len(applied.record.matches) == 8
    assert len(list(applied.program.nodes("fake_quantize"))) == 4


def test_a_tensor_in_two_formats_has_two_quantizers() -> None:
    program = quantized(Rule(Selector(r".*q_proj"), input=M8), Rule(Selector(QKVO), input=M4))
    norm = next(program.nodes("rms_norm"))
    assert sorted(n.args[1] for n in norm.users) == ["mxint4@32", "mxint8@32"]


def test_readers_without_a_format_keep_the_unrounded_tensor() -> None:
    program = quantized(Rule(Selector(r".*q_proj"), input=M4))
    linears = list(program.nodes("linear"))
    assert linears[0].args[0].target is torch.ops.mxfx.fake_quantize.default
    assert linears[1].args[0] is linears[2].args[0] is linears[0].args[0].args[0]


def test_outputs_are_rounded_for_all_their_readers() -> None:
    program = quantized(Rule(Selector(r".*up_proj"), output=M4))
    for node in list(program.nodes("linear")):
        if path_of(node).endswith("up_proj"):
            (reader,) = node.users
            assert reader.target is torch.ops.mxfx.fake_quantize.default and reader.users


def test_an_output_and_the_next_input_in_one_format_are_rounded_once() -> None:
    applied = apply(
        InsertFakeQuant(),
        annotated(Rule(Selector(r".*layernorm"), output=M4), Rule(Selector(r".*(q|k|v)_proj"), input=M4)),
    )
    assert len(list(applied.program.nodes("fake_quantize"))) == 4
    assert any("already" in skip.reason for skip in applied.record.skips)


@pytest.mark.parametrize("kind", ["rms_norm", "rope", "silu"])
def test_inputs_of_other_nodes_are_rounded(kind: str) -> None:
    pattern = {"rms_norm": r".*layernorm", "rope": r".*self_attn", "silu": r".*act_fn"}[kind]
    program = quantized(Rule(Selector(pattern), input=M4))
    for node in program.nodes(kind):
        rounded = node.args[0].target is torch.ops.mxfx.fake_quantize.default
        assert rounded == (path_of(node) != "model.norm")


def test_the_logits_are_those_of_rounding_by_hand() -> None:
    """An observer that rounds what the linears read computes what the inserted nodes compute."""
    program = annotated(Rule(Selector(MLP), input=M4))
    sources = {n.args[0] for n in program.nodes("linear") if ".mlp." in path_of(n)}
    ids, mask, _ = padded_batch()

    def observe(node, value):
        return M4.fake_quantize(value) if node in sources else value

    expected = execute(program, ids, None, mask, observe=observe)
    actual = execute(apply(InsertFakeQuant(), program).program, ids, None, mask)
    assert torch.equal(actual, expected)
    assert not torch.equal(actual, execute(program, ids, None, mask))


def test_read_without_rounding_the_program_is_the_float_one() -> None:
    ids, mask, _ = padded_batch()
    program = quantized(Rule(Selector(MLP), input=M4))
    assert torch.equal(
        execute(program, ids, None, mask, quantize=False), execute(raised("llama-tiny"), ids, None, mask)
    )


def test_a_selection_quantizes_that_part_alone() -> None:
    program = apply(
        InsertFakeQuant(select=Selector(r"model\.layers\.1\..*")), annotated(Rule(Selector(MLP), input=M4))
    ).program
    assert {path_of(n).split(".")[2] for n in program.nodes("fake_quantize")} == {"1"}


def test_a_second_run_finds_everything_done() -> None:
    once = quantized(Rule(Selector(MLP), input=M4))
    record = apply(InsertFakeQuant(), once).record
    assert record.matches == [] and len(record.skips) == 6


def test_the_rewritten_program_verifies() -> None:
    verify(quantized(Rule(Selector(QKVO), input=M4, output=M8), Rule(Selector(MLP), input=M4), family="gemma3-tiny"))


def test_the_fact_is_false_where_formats_are_and_nothing_is_rounded() -> None:
    program = annotated(Rule(Selector(MLP), input=M4))
    assert "is to be mxint4@32 and is not quantized" in str(ACTIVATIONS_QUANTIZED.check(program))
    part = apply(InsertFakeQuant(select=Selector(r"model\.layers\.1\..*")), program).program
    assert "the input of linear_4 (model.layers.0.mlp" in str(ACTIVATIONS_QUANTIZED.check(part)).replace("_default", "")
    with pytest.raises(FactError, match="requires 'annotated'"):
        apply(InsertFakeQuant(), raised("llama-tiny"))
