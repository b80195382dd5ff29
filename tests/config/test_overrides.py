"""--set changes one value and is checked like the file."""

from __future__ import annotations

import pytest

from mxfx.config import ConfigError, Pipeline, apply_overrides, loads, to_toml
from mxfx.formats import parse
from mxfx.rewrite import Selector
from tests.config.stubs import Mark, Rule, Solve

PIPELINE = Pipeline([Mark(rule=(Rule(Selector("a")), Rule(Selector("b")))), Solve(), Solve(damp=0.5)], model="org/m")


def test_a_setting_is_replaced() -> None:
    changed = apply_overrides(PIPELINE, ["calibration.samples=8", "model.name=/data/x", "budget.max_kl=0.1"])
    assert (changed.calibration.samples, changed.model.name, changed.budget.max_kl) == (8, "/data/x", 0.1)


def test_a_pass_by_name_means_every_pass_of_that_name() -> None:
    assert apply_overrides(PIPELINE, ["pass.stub-solve.damp=0.2"]).passes[1:] == (
        Solve(damp=0.2),
        Solve(damp=0.2),
    )


def test_a_pass_by_index_means_one() -> None:
    assert apply_overrides(PIPELINE, ["pass[2].damp=1"]).passes[1:] == (Solve(), Solve(damp=1.0))


def test_a_part_of_a_rule_can_be_set() -> None:
    changed = apply_overrides(PIPELINE, ["pass.stub-mark.rule[1].weight=mxint4@32"]).passes[0]
    assert changed == Mark(rule=(Rule(Selector("a")), Rule(Selector("b"), parse("mxint4@32"))))


def test_values_are_toml_or_else_strings() -> None:
    changed = apply_overrides(PIPELINE, ["pass[1].sites=['a', 'b']", "pass[1].note=a = b", "pass[1].sweep=false"])
    assert changed.passes[1] == Solve(sites=("a", "b"), note="a = b", sweep=False)


def test_the_pipeline_itself_stays_as_it_was() -> None:
    before = to_toml(PIPELINE)
    apply_overrides(PIPELINE, ["pass[1].damp=1", "calibration.seed=3"])
    assert to_toml(PIPELINE) == before


def test_an_overridden_option_is_cited_at_the_command_line() -> None:
    pipeline = loads('[model]\nname = "a/b"\n[[pass]]\nname = "stub-solve"\ndamp = 1\n', "p.toml")
    changed = apply_overrides(pipeline, ["pass.stub-solve.damp=2", "model.name=./gone/x"])
    index = len(changed) - 1
    assert str(changed.location(index, ("damp",))) == "--set:1:22"
    assert str(changed.location(index, ("note",))) == "p.toml:3:1"
    with pytest.raises(ConfigError, match=r"^--set:1:12: no folder"):
        changed.model_source()


@pytest.mark.parametrize(
    ("assignment", "column", "said"),
    [
        ("calibration.sample=8", 1, "did you mean 'samples'"),
        ("calibration.samples=x", 21, "expected: a whole number"),
        ("calibration.samples=0", 21, "must be at least 1"),
        ("calibratoin.samples=8", 1, "did you mean 'calibration'"),
        ("pass.stub-slove.damp=1", 1, "did you mean 'stub-solve'"),
        ("pass[7].damp=1", 1, "[2] stub-solve"),
        ("pass.stub-solve.dmap=1", 1, "did you mean 'damp'"),
        ("pass.stub-solve.damp=-1", 22, "must not be negative"),
        ("pass.stub-mark.rule[2].weight=mxint4@32", 1, "has 2 items"),
        ("pass.stub-mark.rule[0].weight=mxint4", 31, "the block size is missing"),
        ("damp", 1, "sets nothing"),
        ("damp=1", 1, "is no key"),
        ("pass.stub-solve=1", 1, "no key of the pass"),
    ],
)
def test_a_mistake_points_into_the_assignment(assignment: str, column: int, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        apply_overrides(PIPELINE, [assignment])
    assert str(caught.value).startswith(f"--set:1:{column}: ")
    assert said in str(caught.value)
