"""Pipeline files with the command line applied."""

from __future__ import annotations

from pathlib import Path

import pytest

from mxfx.compat.prepare import prepare
from mxfx.config.errors import ConfigError
from mxfx.driver.options import RunOptions
from tests.local_model import save_texts


def test_data_stands_for_the_files_data_set_and_leaves_what_the_model_writes(tmp_path: Path) -> None:
    file = tmp_path / "p.toml"
    file.write_text('pass = []\n[calibration]\ndataset = ["wikitext2", "self"]\nshares = [1, 3]\ncontinued = 0.5\n')
    texts = save_texts(tmp_path / "texts")
    ((_, mixed),) = prepare([file], RunOptions(model="a/b", data=str(texts)))
    assert (mixed.calibration.sources, mixed.calibration.shares) == ((str(texts), "self"), (1.0, 3.0))
    file.write_text(f"{file.read_text()}repeat = true\n")
    ((_, alone),) = prepare([file], RunOptions(model="a/b", data="self"))
    assert (alone.calibration.sources, alone.calibration.shares) == (("self",), ())
    assert (mixed.calibration.continued, alone.calibration.continued) == (0.5, 0.0)


def test_an_assignment_is_for_the_files_that_have_a_place_for_it(tmp_path: Path) -> None:
    for name, text in (("one", 'dataset = "wikitext2"'), ("two", 'dataset = ["wikitext2", "self"]')):
        (tmp_path / f"{name}.toml").write_text(f'[calibration]\n{text}\n[[pass]]\nname = "fuse-norm"\n')
    options = RunOptions(model="a/b", overrides=("calibration.shares=[1,8]",))
    found = prepare([tmp_path / "one.toml", tmp_path / "two.toml"], options)
    assert [pipeline.calibration.shares for _, pipeline in found] == [(), (1.0, 8.0)]
    with pytest.raises(ConfigError, match="expected a positive number for each source"):
        prepare([tmp_path / "one.toml"], options)
    both = RunOptions(model="a/b", overrides=("calibration.continued=0.5",))
    found = prepare([tmp_path / "one.toml", tmp_path / "two.toml"], both)
    assert [pipeline.calibration.continued for _, pipeline in found] == [0.0, 0.5]
    with pytest.raises(ConfigError, match="needs both self and a source of openings"):
        prepare([tmp_path / "one.toml"], both)
    three = RunOptions(model="a/b", overrides=("calibration.shares=[1,8,2]",))
    with pytest.raises(ConfigError, match="expected a positive number for each source"):
        prepare([tmp_path / "one.toml", tmp_path / "two.toml"], three)


def test_a_model_that_is_not_there_is_said_of_the_option_that_names_it(tmp_path: Path) -> None:
    file = tmp_path / "p.toml"
    file.write_text('[[pass]]\nname = "fuse-norm"\n')
    ((_, found),) = prepare([file], RunOptions(model="/nowhere"))
    with pytest.raises(ConfigError, match=r"^--model:1:12: no folder '/nowhere'"):
        found.model_source()
    ((_, found),) = prepare([file], RunOptions(model="a/b", overrides=("model.dtype=float16",)))
    assert (found.model.name, found.model.dtype) == ("a/b", "float16")
