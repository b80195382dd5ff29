"""``annotate`` writes formats on operands, checks what its rules match, and changes nothing else."""

from __future__ import annotations

import pytest
import torch

from mxfx.formats import parse
from mxfx.graph.execute import execute
from mxfx.graph.node import info, path_of
from mxfx.graph.program import Program
from mxfx.passes import Annotate, Rule
from mxfx.rewrite import ExpectationError, FactError, Selector, apply
from mxfx.rewrite.roles import role_of
from tests.filecheck import check_printed
from tests.mixtures import raised_mixture
from tests.programs import ATTENTION, MLP, QKVO, config_a, padded_batch, passed, raised, traced

M4, M8 = parse("mxint4@32"), parse("mxint8@32")


def annotated(*rules: Rule, family: str = "llama-tiny") -> Program:
    return apply(Annotate(rule=rules), raised(family)).program


def formats(program: Program, kind: str = "linear") -> dict[str, dict[str, str]]:
    return {
        path_of(n): {operand: str(a.format) for operand, a in info(n).formats.items()}
        for n in program.nodes(kind)
        if info(n).formats
    }


def test_no_bit_of_the_logits_changes() -> None:
    ids, mask, _ = padded_batch()
    program = annotated(Rule(Selector(MLP), weight=M4, input=M4), Rule(Selector(ATTENTION), kv=M4))
    assert torch.equal(execute(program, ids, None, mask), execute(raised("llama-tiny"), ids, None, mask))


def test_annotations_are_printed_with_the_rule_that_made_them() -> None:
    check_printed(
        annotated(Rule(Selector(QKVO), weight=M4, input=M8), Rule(Selector(ATTENTION), k=M4, v=M8)),
        """
        CHECK: aten.linear({{.*}}@model.layers.0.self_attn.q_proj.weight) {{.*}}{weight: mxint4@32 by "annotate rule 1", input: mxint8@32
        CHECK: mxfx.attention({{.*}}{k: mxint4@32 by "annotate rule 2", v: mxint8@32
        CHECK: aten.linear({{.*}}@model.layers.0.mlp.gate_proj.weight) : bf16[batch, seq, 96] <raise-norm>{{$}}
        """,  # noqa: E501
    )


def test_the_first_rule_wins_for_each_operand_by_itself() -> None:
    record = apply(
        Annotate(rule=(Rule(Selector(r".*q_proj"), weight=M8), Rule(Selector(QKVO), weight=M4, input=M4))),
        raised("llama-tiny"),
    )
    found = formats(record.program)
    assert found["model.layers.0.self_attn.q_proj"] == {"weight": "mxint8@32", "input": "mxint4@32"}
    assert found["model.layers.0.self_attn.k_proj"] == {"weight": "mxint4@32", "input": "mxint4@32"}


def test_a_node_whose_operands_are_all_taken_is_skipped_with_the_reason() -> None:
    rules = (Rule(Selector(r".*q_proj"), weight=M8), Rule(Selector(QKVO), weight=M4))
    record = apply(Annotate(rule=rules), raised("llama-tiny")).record
    assert [s.path for s in record.skips] == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    assert {s.reason for s in record.skips} == {"an earlier rule set these operands"}
    assert len(record.matches) == 8


@pytest.mark.parametrize("expect", ["4 * layers", "8", "(layers + 2) * 2"])
def test_expect_counts_nodes(expect: str) -> None:
    annotated(Rule(Selector(QKVO), weight=M4, expect=expect))


def test_expect_counts_nodes_that_an_earlier_rule_took_too() -> None:
    annotated(Rule(Selector(r".*q_proj"), weight=M8), Rule(Selector(QKVO), weight=M4, expect="4 * layers"))


def test_another_number_than_expected_is_an_error_that_says_both() -> None:
    with pytest.raises(ExpectationError, match=r"rule 1: .* fits 8 nodes, expect = '3 \* layers' asks for 6") as caught:
        annotated(Rule(Selector(QKVO), weight=M4, expect="3 * layers"))
    assert caught.value.rule == 1


def test_a_rule_that_fits_nothing_is_an_error_with_the_nearest_path() -> None:
    with pytest.raises(
        ExpectationError, match=r"rule 2: .* fits no node .*'model\.layers\.\d\.mlp\.up_proj'"
    ) as caught:
        annotated(Rule(Selector(QKVO), weight=M4), Rule(Selector(r"model\.layers\.0\.mlp\.up_porj"), weight=M4))
    assert caught.value.rule == 2


def test_a_rule_that_fits_modules_without_its_operand_is_an_error() -> None:
    with pytest.raises(ExpectationError, match="fits no node that has kv"):
        annotated(Rule(Selector(MLP), kv=M4))


def test_a_pattern_must_fit_the_whole_path() -> None:
    with pytest.raises(ExpectationError, match="whole module paths"):
        annotated(Rule(Selector("up_proj"), weight=M4))


def test_a_bias_is_annotated_only_where_there_is_one() -> None:
    program = annotated(Rule(Selector(QKVO), bias=M8), family="qwen2-tiny")
    assert set(formats(program)) == {f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qkv"}


@pytest.mark.parametrize(
    ("rule", "kind", "operands"),
    [
        (Rule(Selector(r".*self_attn"), q=M4, probs=M4, softmax=M8), "attention", {"q", "probs", "softmax"}),
        (Rule(Selector(r".*self_attn"), rope=M4), "rope", {"cos", "sin"}),
        (Rule(Selector(r".*norm"), input=M4, output=M8), "rms_norm", {"input", "output"}),
        (Rule(Selector(r".*act_fn"), input=M4, output=M4), "silu", {"input", "output"}),
        (Rule(Selector(r".*embed_tokens"), weight=M8), "embedding", {"weight"}),
    ],
)
def test_rules_speak_of_every_kind_of_node(rule: Rule, kind: str, operands: set[str]) -> None:
    found = formats(annotated(rule), kind)
    assert found and all(set(given) == operands for given in found.values())


def test_a_rule_without_a_format_and_one_with_kv_twice_are_refused() -> None:
    with pytest.raises(ValueError, match="names no format; give one of weight, bias, input"):
        Rule(Selector(MLP))
    with pytest.raises(ValueError, match="'kv' speaks of k and v"):
        Rule(Selector(ATTENTION), kv=M4, k=M8)
    with pytest.raises(ValueError, match="may use whole numbers"):
        Rule(Selector(MLP), weight=M4, expect="layers ** 2")


def test_it_comes_after_the_raise_passes_and_before_the_quantizers() -> None:
    rules = (Rule(Selector(MLP), weight=M4),)
    with pytest.raises(FactError, match="requires 'raised'"):
        apply(Annotate(rule=rules), traced("llama-tiny"))
    with pytest.raises(FactError, match="must come before"):
        apply(Annotate(rule=rules), passed(raised("llama-tiny"), config_a()))


def test_it_may_run_twice() -> None:
    first = annotated(Rule(Selector(QKVO), weight=M4))
    second = apply(Annotate(rule=(Rule(Selector(MLP), weight=M8),)), first).program
    assert len(formats(second)) == 14


def test_rules_by_role_fit_fused_weights_and_layers() -> None:
    rule = Rule(role="qkv_proj, mlp", layers="-1", except_=r".*gate_up.*", weight=M4)
    applied = apply(Annotate((rule,), partial=True), raised("phi3-tiny"))
    found = {match.path for match in applied.record.matches}
    assert found == {"model.layers.1.self_attn.qkv_proj", "model.layers.1.mlp.down_proj"}


def test_a_role_that_no_node_has_is_an_error_that_names_those_that_are_there() -> None:
    with pytest.raises(ExpectationError, match=r"of these nodes the roles are .*gate_up_proj.*qkv_proj"):
        apply(Annotate((Rule(role="q_proj", weight=M4),)), raised("phi3-tiny"))


def test_a_router_is_taken_only_by_a_rule_of_its_own() -> None:
    broad = apply(Annotate((Rule(Selector(r".*\.layers\..*"), weight=M4),)), raised_mixture("mixtral"))
    routers = [n for n in broad.program.products() if role_of(n) == "router"]
    assert len(routers) == 2 and all("weight" not in info(n).formats for n in routers)
    assert {skip.reason for skip in broad.record.skips if "router" in skip.reason}
    for rule in (Rule(role="router", weight=M4), Rule(Selector(r".*\.mlp\.gate"), weight=M4)):
        own = apply(Annotate((rule,), partial=True), raised_mixture("mixtral"))
        assert sum("weight" in info(n).formats for n in own.program.products() if role_of(n) == "router") == 2


def test_weights_that_rules_leave_out_are_told() -> None:
    rule = Rule(Selector(r".*\.(q|k|v|o|gate|up|down)_proj"), weight=M4)
    (warning,) = apply(Annotate((rule,)), raised("phi3-tiny")).record.warnings
    assert "2 qkv_proj" in warning and "2 gate_up_proj" in warning and "partial = true" in warning
    assert apply(Annotate((rule,), partial=True), raised("phi3-tiny")).record.warnings == []
    assert apply(Annotate((rule,)), raised("llama-tiny")).record.warnings == []
