"""Every key of a TOML text is found at its line and column."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mxfx.config.errors import ConfigError
from mxfx.config.locate import locate, parse_toml, read_toml
from mxfx.config.toml import _key, _value

TEXT = '''\
# a comment with = and [brackets]
top = """
[not.a.table]
x = 1 \\" """ # after

[model] # header
  "quoted key" = 'C:\\path' # literal
a.b . 'c d' = { x = 1, y.z = [10, [20,
   30 ], # inside
  {k = "]"}] }
[[pass]]
name = "one"
  [[pass.rule]]
  match = 'm'
  [[pass.rule]]
  match = \'\'\'it's''\'\'\'
[[pass]]
name = "two"
  [pass.sub.deep]
  k = 1979-05-27T07:32:00Z
\t[[pass.rule]]
\tmatch = "n"
'''


def position(path: tuple, *, key: bool = False) -> tuple[int, int]:
    mark = locate(TEXT, "f")[path]
    place = mark.key if key else mark.value
    return place.line, place.column


@pytest.mark.parametrize(
    ("path", "key", "value"),
    [
        (("top",), (2, 1), (2, 7)),
        (("model",), (6, 1), (6, 1)),
        (("model", "quoted key"), (7, 3), (7, 18)),
        (("model", "a"), (8, 1), (8, 1)),
        (("model", "a", "b", "c d"), (8, 7), (8, 15)),
        (("model", "a", "b", "c d", "x"), (8, 17), (8, 21)),
        (("model", "a", "b", "c d", "y", "z"), (8, 26), (8, 30)),
        (("model", "a", "b", "c d", "y", "z", 1, 1), (9, 4), (9, 4)),
        (("model", "a", "b", "c d", "y", "z", 2, "k"), (10, 4), (10, 8)),
        (("pass", 0), (11, 1), (11, 1)),
        (("pass", 0, "rule", 1), (15, 3), (15, 3)),
        (("pass", 0, "rule", 1, "match"), (16, 3), (16, 11)),
        (("pass", 1, "name"), (18, 1), (18, 8)),
        (("pass", 1, "sub", "deep", "k"), (20, 3), (20, 7)),
        (("pass", 1, "rule", 0, "match"), (22, 2), (22, 10)),
    ],
)
def test_keys_and_values_are_found(path: tuple, key: tuple[int, int], value: tuple[int, int]) -> None:
    assert (position(path, key=True), position(path)) == (key, value)


def paths_of(value: object, path: tuple = ()) -> set[tuple]:
    """Every key path of a parsed document, items of arrays included."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return {path} | {below for key, item in items for below in paths_of(item, (*path, key))}


def test_no_key_is_missed_and_none_invented() -> None:
    assert set(locate(TEXT, "f")) == paths_of(tomllib.loads(TEXT)) - {()}


def test_windows_line_ends_do_not_shift_columns() -> None:
    text = '[model]\r\nname = "x"\r\n'
    place = locate(text, "f")["model", "name"].value
    assert (str(place), place.text) == ("f:2:8", 'name = "x"')


def test_an_unknown_path_falls_back_to_the_table_around_it() -> None:
    at = parse_toml(TEXT, "f").root
    assert str((at / "pass" / 0 / "rule" / 1 / "weight").place()) == "f:15:3"


scalars = st.one_of(st.integers(-9, 9), st.booleans(), st.text(max_size=6), st.just(1.5))
values = st.recursive(
    scalars,
    lambda v: st.one_of(st.lists(v, max_size=3), st.dictionaries(st.text(max_size=4), v, max_size=3)),
    max_leaves=8,
)


@settings(deadline=None)  # how long an example takes is the machine's load
@given(st.dictionaries(st.text(max_size=5), values, max_size=4))
def test_every_value_starts_where_the_scanner_says(document: dict) -> None:
    text = "".join(f"{_key(key)} = {_value(value)}\n" for key, value in document.items())
    assert tomllib.loads(text) == document
    marks = locate(text, "f")
    assert set(marks) == paths_of(document) - {()}
    lines = text.split("\n")
    for key, value in document.items():
        place = marks[key,].value
        assert lines[place.line - 1][place.column - 1 :] == _value(value)


def test_a_syntax_error_has_its_position() -> None:
    with pytest.raises(ConfigError, match=r"^f\.toml:2:6: not valid TOML: ") as caught:
        parse_toml("[model]\nname 3\n", "f.toml")
    assert caught.value.place.text == "name 3"


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "rtn.toml").write_text("")
    with pytest.raises(ConfigError, match=r"no such file(.|\n)*did you mean 'rtn\.toml'"):
        read_toml(tmp_path / "rtm.toml")


def test_a_folder_in_a_files_place_is_called_one(tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    with pytest.raises(ConfigError, match=r"configs: a folder\n  expected: a TOML pipeline, a file$"):
        read_toml(tmp_path / "configs")
