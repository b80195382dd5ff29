"""``allocate-bits``: formats by what rounding costs, within a budget, told in the report and frozen as TOML."""

from __future__ import annotations

import itertools
import math
from functools import partial
from pathlib import Path

import pytest
import torch

from mxfx.calibration.sensitivity import Operands, kl_of_rounding
from mxfx.calibration.training import divergence
from mxfx.config import Pipeline
from mxfx.config.pipeline import loads
from mxfx.formats import parse
from mxfx.graph.node import info, path_of
from mxfx.graph.program import Program
from mxfx.graph.tiny import tiny
from mxfx.graph.trace import trace
from mxfx.passes import AllocateBits, Annotate, Rule
from mxfx.pipeline.manager import PassManager
from mxfx.rewrite import Context, Selector, apply
from mxfx.runtime.causal_lm import emit
from tests.mixtures import mixture, raised_mixture

TOKENS = torch.randint(3, 128, (24, 48), generator=torch.Generator().manual_seed(0))
FORMATS = tuple(parse(f"mxint{bits}@32/mse") for bits in (3, 4, 6, 8))
CTX = Context(tokens=lambda: TOKENS)


@pytest.fixture(scope="module")
def program() -> Program:
    rule = Rule(Selector(r".*_proj"), weight=FORMATS[1], input=FORMATS[1])
    return PassManager().run(trace(tiny("llama-tiny")), Pipeline([Annotate(rule=(rule,))]).completed()).program


def _measured(program: Program, name: str, fmt, expected: torch.Tensor) -> float:
    """KL when one linear's weight alone is rounded."""
    other = program.copy()
    weight = other.weight_of(next(n for n in other.nodes("linear") if n.name == name))
    other.weights.set(weight, fmt.fake_quantize(other.weights[weight]), "test")
    with torch.no_grad():
        return float(divergence(emit(other)(TOKENS), expected))


def test_the_predicted_divergence_is_what_rounding_one_weight_costs(program: Program) -> None:
    linears = [n for n in program.nodes("linear") if "weight" in info(n).formats]
    fmt = parse("mxint5@32/mse")
    predicted = kl_of_rounding(program, linears, [Operands(fmt, None)], TOKENS, CTX)
    expected = tiny("llama-tiny")(TOKENS).logits.detach()
    # Of the second layer, and two of the first: q, k, v, o, gate, up, down.
    for node in [*linears[:3:2], *linears[7:]]:
        assert 0.4 < predicted[node.name][0] / _measured(program, node.name, fmt, expected) < 2.5


def test_an_expert_costs_what_the_tokens_that_read_it_lose() -> None:
    """Once each token was multiplied by every expert of a stack, and their errors were added up."""
    program = raised_mixture("mixtral")
    stacks = list(program.nodes("expert_linear"))
    fmt = parse("mxint5@32/mse")
    predicted = kl_of_rounding(program, stacks, [Operands(fmt, None)], TOKENS, CTX)
    expected = mixture("mixtral")(TOKENS).logits.detach()
    for node in stacks:
        other = program.copy()
        weight = other.weight_of(next(n for n in other.nodes("expert_linear") if n.name == node.name))
        other.weights.set(weight, fmt.fake_quantize(other.weights[weight]), "test")
        with torch.no_grad():
            measured = float(divergence(emit(other)(TOKENS), expected))
        # What changes in the first layer makes the second choose other experts, which no gradient sees.
        assert 0.3 < predicted[node.name][0] / measured < 2.5


def test_the_budget_holds_and_costlier_sites_get_more_bits(program: Program) -> None:
    done = apply(AllocateBits(bits=4.6, formats=FORMATS, samples=8), program, CTX)
    details = done.record.details
    assert details["bits"] <= 4.6
    assert details["predicted_kl"] < details["uniform"]["mxint4@32/mse"]["predicted_kl"]
    weights = {path_of(n): info(n).formats["weight"].format for n in done.program.nodes("linear") if info(n).formats}
    assert len(set(weights.values())) > 1
    for row in details["sites"]:
        assert {str(weights[path]) for path in row["linears"]} == {row["format"]}


def test_the_report_has_what_the_choice_costs_and_the_curve_of_the_best_choices(program: Program) -> None:
    details = apply(AllocateBits(bits=4.6, formats=FORMATS, samples=8), program, CTX).record.details
    assert 0.3 < details["measured_kl"] / details["predicted_kl"] < 3
    curve, points = details["kl_over_bits"]["curve"], details["kl_over_bits"]["points"]
    bits, losses = zip(*curve, strict=True)
    assert list(bits) == sorted(bits) and list(losses) == sorted(losses, reverse=True)
    assert (bits[0], bits[-1]) == (3.25, 8.25) and points["chosen"]["bits"] == details["bits"]
    assert points["chosen, measured"]["kl"] == details["measured_kl"]
    assert list(details["bits_over_layers"]["bars"]) == ["layer 0", "layer 1"]
    # Uniform formats are no better than the best choice of as many bits or fewer.
    for point in (points[str(fmt)] for fmt in FORMATS):
        assert min(loss for at, loss in curve if at <= point["bits"]) <= point["predicted_kl"] * 1.05


def test_weight_and_input_get_one_format_and_siblings_the_same(program: Program) -> None:
    done = apply(AllocateBits(bits=4.6, formats=FORMATS, samples=8), program, CTX)
    for node in done.program.nodes("linear"):
        formats = info(node).formats
        assert not formats or formats["weight"].format == formats["input"].format
    (q, k) = (
        next(n for n in done.program.nodes("linear") if path_of(n).endswith(f"layers.0.self_attn.{name}_proj"))
        for name in "qk"
    )
    assert info(q).formats["input"].format == info(k).formats["input"].format


def test_the_frozen_choice_is_an_annotate_that_gives_the_same_formats(program: Program, tmp_path: Path) -> None:
    file = tmp_path / "choice.toml"
    done = apply(AllocateBits(bits=5.0, formats=FORMATS, samples=4, freeze=file), program, CTX)
    again = PassManager().run(trace(tiny("llama-tiny")), loads(file.read_text())).program
    mine, theirs = (
        {path_of(n): {o: str(a.format) for o, a in info(n).formats.items()} for n in p.nodes("linear")}
        for p in (done.program, again)
    )
    assert mine == theirs


def test_inputs_without_a_format_are_neither_charged_nor_frozen() -> None:
    """Of weights in few bits alone, the cost was that of rounding inputs too, and the frozen rules rounded them."""
    rule = Rule(Selector(r".*_proj"), weight=FORMATS[1])
    only = PassManager().run(trace(tiny("llama-tiny")), Pipeline([Annotate(rule=(rule,))]).completed()).program
    details = apply(AllocateBits(bits=4.6, formats=FORMATS, samples=4), only, CTX).record.details
    linears = [n for n in only.nodes("linear") if info(n).formats]
    costs = kl_of_rounding(only, linears, [Operands(fmt, None) for fmt in FORMATS], TOKENS[:4], CTX)
    for index, fmt in enumerate(FORMATS):
        expected = sum(cost[index] for cost in costs.values())
        assert details["uniform"][str(fmt)]["predicted_kl"] == pytest.approx(expected, rel=1e-6)
    assert "weight =" in details["toml"] and "input =" not in details["toml"]


def _cost(row: dict, fmt) -> float:
    return row["predicted_kl"][str(fmt)]


def test_weights_and_inputs_apart_lose_no_more_than_together_under_the_same_budgets(program: Program) -> None:
    choose = partial(AllocateBits, bits=4.6, formats=FORMATS, samples=4)
    together = apply(choose(), program, CTX).record.details
    apart = apply(choose(input_bits=4.6), program, CTX).record.details
    assert apart["bits"] <= 4.6 and apart["input_bits"] <= 4.6
    # By the same prediction: that of one operand alone.
    joint = 0.0
    for row in together["sites"]:
        alone = [one for one in [*apart["sites"], *apart["inputs"]] if set(one["linears"]) <= set(row["linears"])]
        joint += sum(_cost(one, row["format"]) for one in alone)
    assert apart["predicted_kl"] <= joint
    assert 0.3 < apart["measured_kl"] / apart["predicted_kl"] < 3


def test_costs_apart_are_those_of_one_operand_alone(program: Program) -> None:
    details = apply(AllocateBits(formats=FORMATS, input_bits=5.0, samples=2), program, CTX).record.details
    linears = [n for n in program.nodes("linear") if info(n).formats]
    names = {path_of(n): n.name for n in linears}
    for operand, kind in (("weight", "sites"), ("input", "inputs")):
        alone = [Operands(**({"weight": None, "input": None} | {operand: fmt})) for fmt in FORMATS]
        costs = kl_of_rounding(program, linears, alone, TOKENS[:2], CTX)
        assert sorted(path for row in details[kind] for path in row["linears"]) == sorted(names)
        for row in details[kind]:
            for index, fmt in enumerate(FORMATS):
                expected = sum(costs[names[path]][index] for path in row["linears"])
                assert _cost(row, fmt) == pytest.approx(expected, rel=1e-6)


def test_either_choice_is_the_best_but_for_one_exchange(program: Program) -> None:
    """Against every choice for four linears of one layer and their inputs, which rows of weights weigh."""
    two = (FORMATS[0], FORMATS[3])
    select = Selector(r"model\.layers\.1\..*(q|k|v|down)_proj")
    done = apply(AllocateBits(bits=5.5, input_bits=5.5, formats=two, samples=2, select=select), program, CTX)
    details = done.record.details
    shapes = {path_of(n): program.weights[program.weight_of(n)].numel() for n in program.nodes("linear")}
    for kind, bits in (("sites", "bits"), ("inputs", "input_bits")):
        rows = details[kind]
        sizes = [sum(shapes[path] for path in row["linears"]) for row in rows]
        best = math.inf
        for formats in itertools.product(two, repeat=len(rows)):
            spent = sum(size * fmt.bits_per_element for size, fmt in zip(sizes, formats, strict=True))
            if spent <= 5.5 * sum(sizes):
                best = min(best, sum(_cost(row, fmt) for row, fmt in zip(rows, formats, strict=True)))
        found = sum(_cost(row, row["format"]) for row in rows)
        spent = sum(s * parse(row["format"]).bits_per_element for s, row in zip(sizes, rows, strict=True))
        assert details[bits] == pytest.approx(spent / sum(sizes)) and details[bits] <= 5.5
        saves = max(
            (_cost(row, two[0]) - _cost(row, two[1]) for row in rows if row["format"] == str(two[0])), default=0
        )
        assert best <= found <= best + saves


def test_a_choice_apart_is_frozen_and_shown_by_operand(program: Program, tmp_path: Path) -> None:
    file = tmp_path / "choice.toml"
    inputs = tuple(map(parse, ("mxfp6_e2m3@32", "mxint8@32")))
    chooser = AllocateBits(bits=4.6, formats=FORMATS, input_bits=7.0, input_formats=inputs, samples=2, freeze=file)
    done = apply(chooser, program, CTX)
    again = PassManager().run(trace(tiny("llama-tiny")), loads(file.read_text())).program
    mine, theirs = (
        {path_of(n): {o: str(a.format) for o, a in info(n).formats.items()} for n in p.nodes("linear")}
        for p in (done.program, again)
    )
    assert mine == theirs
    quantized = [formats for formats in mine.values() if formats]
    assert {formats["input"] for formats in quantized} == set(map(str, inputs))
    assert {formats["weight"] for formats in quantized} <= set(map(str, FORMATS))
    details = done.record.details
    assert details["kl_over_input_bits"]["points"]["chosen"]["bits"] == details["input_bits"] <= 7.0
    assert list(details["input_bits_over_layers"]["bars"]) == ["layer 0", "layer 1"]
    assert sum(details["inputs_by_format"].values()) == len(details["inputs"]) == 8


def test_a_budget_for_inputs_that_have_no_format_is_said() -> None:
    rule = Rule(Selector(r".*_proj"), weight=FORMATS[1])
    only = PassManager().run(trace(tiny("llama-tiny")), Pipeline([Annotate(rule=(rule,))]).completed()).program
    record = apply(AllocateBits(bits=4.6, input_bits=8.25, formats=FORMATS, samples=1), only, CTX).record
    assert any("no selected linear has an input format" in warning for warning in record.warnings)
    assert "inputs" not in record.details


def test_budgets_of_inputs_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="give that budget too"):
        AllocateBits(input_formats=FORMATS)
    with pytest.raises(ValueError, match=r"'input_bits' is 3\.0, and no format of inputs takes less than 3\.25"):
        AllocateBits(formats=FORMATS, input_bits=3.0)
    with pytest.raises(ValueError, match="'input_formats' is empty"):
        AllocateBits(input_bits=5.0, input_formats=())


def test_a_budget_in_bytes_is_that_in_bits(program: Program) -> None:
    count = sum(t.numel() for name, t in program.weights.items() if "_proj" in name)
    (bits, size) = (
        apply(AllocateBits(formats=FORMATS, samples=2, **how), program, CTX).record.details["sites"]
        for how in ({"bits": 4.75}, {"size": int(4.75 * count / 8)})
    )
    assert bits == size
    with pytest.raises(ValueError, match=r"'size' is 100 bytes, and these weights take .* at the least"):
        apply(AllocateBits(formats=FORMATS, samples=2, size=100), program, CTX)


def test_more_bits_cost_less(program: Program) -> None:
    predicted = [
        apply(AllocateBits(bits=bits, formats=FORMATS, samples=4), program, CTX).record.details["predicted_kl"]
        for bits in (3.25, 4.25, 6.25)
    ]
    assert predicted == sorted(predicted, reverse=True)


def test_a_budget_below_every_format_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no format takes less than 3\.25"):
        AllocateBits(bits=3.0, formats=FORMATS)


def test_without_annotated_linears_it_warns(program: Program) -> None:
    done = apply(AllocateBits(select=Selector("nothing")), program, CTX)
    assert done.record.warnings == ["nothing to choose: no selected linear has a weight format"]
