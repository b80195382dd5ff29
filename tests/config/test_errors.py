"""What a user gets wrong is one error: where, what was given, what was expected, the nearest name."""

from __future__ import annotations

from pathlib import Path

import pytest

from mxfx.config import ConfigError, Pipeline, load, loads
from tests.config.stubs import Solve

GOOD = r"""
[model]
name = "org/model"

[[pass]]
name = "stub-mark"
  [[pass.rule]]
  match  = 'model\.layers\.\d+\.mlp'
  weight = "mxint4@32"
  expect = "3 * layers"

[[pass]]
name = "stub-solve"
damp = 0.1
"""


def error_of(text: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        loads(text, "p.toml")
    return caught.value


def test_the_good_file_loads() -> None:
    assert loads(GOOD).passes[-1] == Solve(damp=0.1)


@pytest.mark.parametrize(
    ("old", "new", "place", "said"),
    [
        ("match ", "mach ", "8:3", ["unknown key 'mach'", "match, weight", "did you mean 'match'?"]),
        ("damp", "dampp", "14:1", ["unknown key 'dampp' in pass 'stub-solve'", "did you mean 'damp'?"]),
        ("mxint4@32", "mxint4@", "9:12", ["unknown format 'mxint4@'", "did you mean 'mxint4@32'?"]),
        ("mxint4@32", "mxfp4@32", "9:12", ["'mxfp4@32'", "did you mean 'mxfp4_e2m1@32'?"]),
        (r"\d+\.mlp", r"(\d+", "8:12", ["is no regular expression", "missing )"]),
        ('"stub-solve"', '"stub-slove"', "13:8", ["unknown pass 'stub-slove'", "did you mean 'stub-solve'?"]),
        ("damp = 0.1", 'damp = "0.1"', "14:8", ["'0.1' is a string", "expected: a number"]),
        ("damp = 0.1", "damp = true", "14:8", ["true is a boolean", "expected: a number"]),
        ("damp = 0.1", "damp = -1", "14:8", ["'damp' is -1.0, must not be negative"]),
        ("damp = 0.1", "samples = 1.5", "14:11", ["1.5 is a fraction", "expected: a whole number"]),
        ("damp = 0.1", 'order = "blok"', "14:9", ["one of block, none", "did you mean 'block'?"]),
        ("damp = 0.1", 'sites = "q_proj"', "14:9", ["is a string", "an array, each item a string"]),
        ("damp = 0.1", 'sites = ["a", 3]', "14:15", ["3 is a whole number", "expected: a string"]),
        ('"3 * layers"', '"3 ** layers"', "10:12", ["'3 ** layers'", "may use"]),
        ("[model]", "[modle]", "2:1", ["unknown table 'modle'", "did you mean 'model'?"]),
        ("[[pass]]", "[pass]", "5:1", ["double brackets"]),
        ('name = "stub-solve"', "sweep = true", "12:1", ["a pass without a name"]),
        ("name = \"org/model\"", "dtype = \"int8\"", "3:9", ["one of bfloat16"]),
    ],
)  # fmt: skip
def test_a_mistake_is_one_error_at_its_place(old: str, new: str, place: str, said: list[str]) -> None:
    last = (
        GOOD.replace(old, new)
        if old != "[[pass]]"
        else GOOD[: GOOD.index('\n[[pass]]\nname = "stub-solve')].replace(old, new)
    )
    error = error_of(last)
    assert str(error).startswith(f"p.toml:{place}: ")
    assert [part for part in said if part not in str(error)] == []


@pytest.mark.parametrize("text", ["", "# nothing yet", '[model]\nname = "org/model"\n'])
def test_a_file_without_passes_does_not_stand_for_the_float_model(text: str) -> None:
    assert str(error_of(text)).startswith("p.toml: the file has no passes\n  expected: [[pass]] tables; pass = []")
    assert loads("pass = []\n" + text) == Pipeline(model="org/model" if text[:1] == "[" else None).completed()


@pytest.mark.parametrize(
    ("settings", "place", "said"),
    [
        ('dataset = ["self", "self"]', "2:11", "expected each source once"),
        ('dataset = "self"\nrepeat = true', "3:10", "'repeat' reads texts again, and dataset is self alone"),
        ('dataset = ["c4", "self"]\nshares = [1]', "3:10", "expected a positive number for each source"),
        ('dataset = "c4"\ncontinued = 0.5', "3:13", "needs both self and a source of openings"),
    ],
)
def test_calibration_that_means_nothing_is_refused(settings: str, place: str, said: str) -> None:
    error = error_of(f"[calibration]\n{settings}\n[[pass]]\nname = 'stub-solve'\n")
    assert str(error).startswith(f"p.toml:{place}: ") and said in str(error)


def test_a_table_that_is_none_is_told_what_it_may_be() -> None:
    assert error_of('[[passes]]\nname = "stub-solve"\n').hint == "did you mean [[pass]]?"
    assert 'by = "regex_name"' in error_of("[gptqq]\n").hint


def test_the_caret_stands_below_the_mistake() -> None:
    lines = str(error_of(GOOD.replace("match ", "mach "))).splitlines()
    assert lines[1].index("mach") == lines[2].index("^")


def test_a_missing_required_option_is_named() -> None:
    error = error_of('[[pass]]\nname = "stub-need"\n')
    assert str(error).startswith("p.toml:1:1: pass 'stub-need' lacks the key 'format'")


def test_a_later_check_can_cite_the_line_of_a_rule() -> None:
    pipeline = loads(GOOD, "p.toml")
    index = [spec.name for spec in pipeline.specs].index("stub-mark")
    assert str(pipeline.location(index, ("rule", 0, "match"))) == "p.toml:8:12"
    assert str(pipeline.location(index, ("rule", 0, "input"))) == "p.toml:7:3"
    assert str(pipeline.error(index, ("rule", 0, "match"), "fits nothing")).startswith("p.toml:8:12: fits nothing\n")


def test_a_model_path_that_does_not_exist_is_refused_without_reading_weights(tmp_path: Path) -> None:
    (tmp_path / "llama").mkdir()
    (tmp_path / "p.toml").write_text(GOOD.replace("org/model", f"{tmp_path}/lama"))
    with pytest.raises(ConfigError, match=r"p\.toml:3:8: no folder (.|\n)*did you mean 'llama'"):
        load(tmp_path / "p.toml").model_source()


def test_a_folder_without_a_config_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        Pipeline(model=str(tmp_path)).model_source()
    (tmp_path / "config.json").write_text("{}")
    assert Pipeline(model=str(tmp_path)).model_source() == tmp_path


def test_a_hub_id_is_left_to_the_hub() -> None:
    assert loads(GOOD).model_source() == "org/model"


def test_no_model_says_how_to_name_one() -> None:
    with pytest.raises(ConfigError, match="--model"):
        Pipeline().model_source()
