"""``round-weights`` puts annotated weights on their grids, once, and refuses to round behind somebody's back."""

from __future__ import annotations

import pytest
import torch

from mxfx.config import ConfigError, Pipeline, check_order
from mxfx.formats import parse
from mxfx.graph.node import kind
from mxfx.graph.program import Program
from mxfx.passes import Annotate, FuseNorm, Gptq, RoundWeights, Rule
from mxfx.rewrite import FactError, Selector, apply
from mxfx.rewrite.facts import WEIGHTS_ROUNDED
from mxfx.rewrite.size import bits_per_weight
from tests.filecheck import check_printed
from tests.programs import MLP, QKVO, passed, raised

M4, M8 = parse("mxint4@32"), parse("mxint8@32")
HEAD = r"lm_head"
EMBEDDING = r"model\.embed_tokens"


def annotated(*rules: Rule, family: str = "llama-tiny") -> Program:
    return apply(Annotate(rule=rules), raised(family)).program


def test_each_weight_is_rounded_along_its_input_axis() -> None:
    before = annotated(Rule(Selector(QKVO), weight=M4), Rule(Selector(MLP), weight=M8))
    after = apply(RoundWeights(), before).program
    for node in after.nodes("linear"):
        name = after.weight_of(node)
        fmt = M4 if "self_attn" in name else M8 if "mlp" in name else None
        expected = before.weights[name] if fmt is None else fmt.fake_quantize(before.weights[name], axis=1)
        assert torch.equal(after.weights[name], expected), name


def test_the_ledger_names_every_rounded_weight_and_its_error() -> None:
    program = apply(RoundWeights(), annotated(Rule(Selector(MLP), weight=M4))).program
    assert len(program.weights.ledger) == 6
    assert all(c.pass_name == "round-weights" and 0.01 < c.error < 0.3 for c in program.weights.ledger)


def test_the_graph_keeps_its_shape_and_says_what_is_rounded() -> None:
    check_printed(
        apply(RoundWeights(), annotated(Rule(Selector(r".*\.0\..*up_proj"), weight=M4))).program,
        """
        CHECK: aten.linear(%{{.+}}, @model.layers.0.mlp.up_proj.weight) {{.*}} !{"rounded": ["weight"]} <{{.*}}round-weights>
        CHECK-NOT: rounded
        CHECK: return
        """,  # noqa: E501
    )


def test_biases_are_rounded_too() -> None:
    before = annotated(Rule(Selector(r".*q_proj"), bias=M4), family="qwen2-tiny")
    after = apply(RoundWeights(), before).program
    name = "model.layers.1.self_attn.q_proj.bias"
    assert torch.equal(after.weights[name], M4.fake_quantize(before.weights[name]))


def test_masters_are_rounded_in_float32_whatever_the_model_s_dtype() -> None:
    half = annotated(Rule(Selector(MLP), weight=M4)).twin(torch.bfloat16)
    rounded = apply(RoundWeights(), half).program
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(rounded.weights[name].float(), M4.fake_quantize(half.weights[name].float()))


def test_what_is_on_the_grid_already_is_skipped() -> None:
    once = apply(RoundWeights(select=Selector(r".*up_proj")), annotated(Rule(Selector(MLP), weight=M4))).program
    record = apply(RoundWeights(), once).record
    assert len(record.matches) == 4
    assert {s.reason for s in record.skips} == {"weight is on the grid of mxint4@32 already"}


def test_a_selection_rounds_that_part_alone() -> None:
    before = annotated(Rule(Selector(MLP), weight=M4))
    after = apply(RoundWeights(select=Selector(r"model\.layers\.1\..*")), before).program
    changed = {n for n in before.weights if not torch.equal(before.weights[n], after.weights[n])}
    assert changed == {f"model.layers.1.mlp.{p}_proj.weight" for p in ("gate", "up", "down")}


@pytest.mark.parametrize(
    ("rules", "other"),
    [
        ((Rule(Selector(HEAD), weight=M4),), "unquantized"),
        ((Rule(Selector(HEAD), weight=M4), Rule(Selector(EMBEDDING), weight=M8)), "mxint8@32"),
    ],
)
def test_a_tied_weight_that_is_read_otherwise_elsewhere_is_refused(rules: tuple[Rule, ...], other: str) -> None:
    with pytest.raises(ValueError, match="which reads the same tensor; untie it") as caught:
        apply(RoundWeights(), annotated(*rules))
    assert other in str(caught.value) and "model.embed_tokens" in str(caught.value)


def test_a_tied_weight_that_all_readers_want_alike_is_rounded_once() -> None:
    rules = (Rule(Selector(HEAD), weight=M4), Rule(Selector(EMBEDDING), weight=M4))
    program = apply(RoundWeights(), annotated(*rules)).program
    assert len(program.weights.ledger) == 1
    assert program.weights["lm_head.weight"] is program.weights["model.embed_tokens.weight"]


def test_an_untied_head_is_rounded_alone() -> None:
    untied = passed(raised("llama-tiny"), (FuseNorm(), Annotate(rule=(Rule(Selector(HEAD), weight=M4),))))
    program = apply(RoundWeights(), untied).program
    head = [n for n in program.nodes("linear")][-1]
    (embedding,) = program.nodes("embedding")
    assert {c.weight for c in program.weights.ledger if c.pass_name == "round-weights"} == {program.weight_of(head)}
    original = raised("llama-tiny").weights["model.embed_tokens.weight"]
    assert torch.equal(program.weights[program.weight_of(embedding)], original)


def test_weights_count_in_their_format_once_they_are_rounded() -> None:
    before = annotated(Rule(Selector(MLP), weight=M4))
    rounded = sum(
        before.weights[before.weight_of(n)].numel() for n in before.nodes("linear") if "mlp" in before.weight_of(n)
    )
    total = sum(t.numel() for t in before.weights.values())
    assert bits_per_weight(before) == 32
    expected = (rounded * 4.25 + (total - rounded) * 32) / total
    assert bits_per_weight(before, planned=True) == pytest.approx(expected)
    assert bits_per_weight(apply(RoundWeights(), before).program) == pytest.approx(expected)


def test_without_annotations_it_is_refused() -> None:
    with pytest.raises(FactError, match="requires 'annotated'"):
        apply(RoundWeights(), raised("llama-tiny"))


def test_the_fact_is_false_where_formats_are_and_nothing_is_rounded() -> None:
    program = annotated(Rule(Selector(MLP), weight=M4))
    assert "is not rounded" in str(WEIGHTS_ROUNDED.check(program))
    assert WEIGHTS_ROUNDED.check(apply(RoundWeights(), program).program) is None


def test_the_fact_speaks_of_what_was_selected_and_not_of_one_weight_somewhere() -> None:
    first = Selector(r"model\.layers\.0\..*")
    part = apply(RoundWeights(select=first), annotated(Rule(Selector(MLP), weight=M4))).program
    assert WEIGHTS_ROUNDED.check(part, first) is None
    assert "model.layers.1.mlp.gate_proj" in str(WEIGHTS_ROUNDED.check(part))


def test_a_part_that_is_rounded_leaves_the_rest_to_be_calibrated() -> None:
    program = annotated(Rule(Selector(MLP), weight=M4))
    part = apply(RoundWeights(select=Selector(r".*down_proj")), program).program
    assert "rounded-to-nearest" not in part.facts and "weights-rounded" in part.facts
    assert "rounded-to-nearest" in apply(RoundWeights(), program).program.facts
    check_order(Pipeline([RoundWeights(select=Selector(r".*down_proj")), Gptq()]), program.facts)
    with pytest.raises(ConfigError, match="'gptq' must come before 'rounded-to-nearest'"):
        check_order(Pipeline([RoundWeights(), Gptq()]), program.facts)


def test_no_node_is_added() -> None:
    before = annotated(Rule(Selector(MLP), weight=M4))
    after = apply(RoundWeights(), before).program
    assert [kind(n) for n in after.graph.nodes] == [kind(n) for n in before.graph.nodes]
