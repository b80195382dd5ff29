"""TOML, one line of text and Python values are three forms of one pipeline."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mxfx.config import (
    BudgetConfig,
    CalibrationConfig,
    ConfigError,
    ModelConfig,
    PassSpec,
    Pipeline,
    from_text,
    loads,
    to_text,
    to_toml,
)
from mxfx.formats import parse
from mxfx.rewrite import Selector
from tests.config.stubs import Mark, Need, Rule, Solve

words = st.text(max_size=12)
formats = st.sampled_from(["mxint4@32", "mxint8@16/mse", "mxfp4_e2m1@32", "minifloat_e3m4"]).map(parse)
selectors = st.sampled_from([r".*", r"model\.layers\.\d+\.(q|k)_proj", "a'b", 'a"b', "x,y={z}[w]"]).map(Selector)
rules = st.builds(
    Rule,
    match=selectors,
    weight=st.none() | formats,
    input=st.none() | formats,
    expect=st.none() | st.just("2*layers"),
)
solves = st.builds(
    Solve,
    select=selectors,
    damp=st.floats(0, 1e300),
    samples=st.none() | st.integers(),
    sweep=st.booleans(),
    order=st.sampled_from(["block", "none"]),
    note=words,
    cache=st.none() | words.map(Path),
    sites=st.lists(words, max_size=3).map(tuple),
    grid=st.lists(st.lists(st.integers(), max_size=2).map(tuple), max_size=2).map(tuple),
)
passes = st.one_of(
    solves, st.builds(Mark, rule=st.lists(rules, max_size=3).map(tuple)), st.builds(Need, format=formats)
)
pipelines = st.builds(
    Pipeline,
    st.lists(passes, max_size=4),
    model=st.none() | st.builds(ModelConfig, name=st.none() | words, dtype=st.sampled_from(["bfloat16", "float32"])),
    calibration=st.none()
    | st.builds(CalibrationConfig, dataset=words, samples=st.integers(1, 99), seed=st.integers(0, 9)),
    budget=st.none()
    | st.builds(BudgetConfig, max_ppl_ratio=st.none() | st.floats(1, 9), max_kl=st.none() | st.floats(0.1, 9)),
)


@settings(deadline=None)  # how long an example takes is the machine's load
@given(pipelines)
def test_toml_loads_back(pipeline: Pipeline) -> None:
    assert loads(to_toml(pipeline)) == pipeline.completed()
    assert loads(to_toml(pipeline, defaults=True)) == pipeline.completed()


@settings(deadline=None)  # how long an example takes is the machine's load
@given(pipelines)
def test_text_reads_back(pipeline: Pipeline) -> None:
    if pipeline.specs or to_text(pipeline):
        assert from_text(to_text(pipeline)) == pipeline
        assert to_text(from_text(to_text(pipeline))) == to_text(pipeline)


@settings(deadline=None)  # how long an example takes is the machine's load
@given(pipelines)
def test_values_make_the_same_pipeline(pipeline: Pipeline) -> None:
    again = Pipeline(pipeline.passes, pipeline.model, pipeline.calibration, pipeline.budget)
    assert again == pipeline
    assert to_toml(again) == to_toml(pipeline)


@settings(deadline=None)  # how long an example takes is the machine's load
@given(pipelines)
def test_printing_is_a_fixed_point(pipeline: Pipeline) -> None:
    once = to_toml(loads(to_toml(pipeline)))
    assert to_toml(loads(once)) == once


def test_the_one_liner_reads_as_documented() -> None:
    pipeline = from_text("stub-mark{rule=[{match='a\\.b', weight=mxint4@32}]}, stub-solve{damp=0.05}")
    assert pipeline.passes == (Mark(rule=(Rule(Selector(r"a\.b"), parse("mxint4@32")),)), Solve(damp=0.05))


def test_the_one_liner_is_canonical() -> None:
    text = "stub-mark { rule = [ { weight = 'mxint4@32/floor', match = \"m\" }, ] } , stub-solve{ }"
    assert to_text(from_text(text)) == "stub-mark{rule=[{match=m,weight=mxint4@32}]},stub-solve"


@pytest.mark.parametrize(
    ("text", "column", "said"),
    [
        ("stub-solve{dmap=1}", 12, "did you mean 'damp'"),
        ("stub-solve{damp=x}", 17, "expected: a number"),
        ("stub-mark,stub-slove", 11, "did you mean 'stub-solve'"),
        ("stub-solve{damp=1", 18, "the text ends here"),
        ("stub-solve{damp 1}", 17, "'=' after 'damp'"),
        ("stub-solve{note='a}", 17, "no closing '"),
        ("stub-solve{damp=1,damp=2}", 19, "given twice"),
        ("stub-solve}", 11, "unexpected '}'"),
        ("", 1, "the name of a pass"),
    ],
)
def test_a_mistake_in_the_one_liner_has_its_column(text: str, column: int, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_text(text)
    assert str(caught.value).startswith(f"--passes:1:{column}: ")
    assert said in str(caught.value)


def test_the_one_liner_holds_exactly_what_it_says() -> None:
    assert [spec.name for spec in from_text("stub-solve").specs] == ["stub-solve"]


def test_a_file_starts_with_the_raise_passes_unless_it_lists_one_of_them() -> None:
    def names(text: str) -> list[str]:
        return [spec.name for spec in loads(text).specs]

    assert names("pass = []") == ["raise-norm", "raise-rope", "raise-attention", "split-fused"]
    listed = '[[pass]]\nname = "stub-solve"\n[[pass]]\nname = "raise-rope"\n'
    assert names(listed) == ["stub-solve", "raise-rope"]


def test_a_pass_that_is_not_registered_prints_but_does_not_run() -> None:
    pipeline = Pipeline([PassSpec("not-yet", {"damp": 0.5})])
    assert to_toml(pipeline) == '[[pass]]\nname = "not-yet"\ndamp = 0.5\n'
    with pytest.raises(ConfigError, match="unknown pass 'not-yet'"):
        _ = pipeline.passes


def test_options_that_were_set_to_their_default_stay_visible() -> None:
    text = '[[pass]]\nname = "stub-solve"\ndamp = 0.01\n'
    assert "damp = 0.01" in to_toml(loads(text))
    assert "order" not in to_toml(loads(text))
    assert 'order  = "block"' in to_toml(loads(text), defaults=True)
