"""Pipeline files with the command line applied."""

from __future__ import annotations

from pathlib import Path

from mxfx.compat.prepare import prepare
from mxfx.driver.options import RunOptions
from tests.local_model import save_texts


def test_data_stands_for_the_files_data_set_and_leaves_what_the_model_writes(tmp_path: Path) -> None:
    file = tmp_path / "p.toml"
    file.write_text('[calibration]\ndataset = ["wikitext2", "self"]\nshares = [1, 3]\n')
    texts = save_texts(tmp_path / "texts")
    ((_, mixed),) = prepare([file], RunOptions(model="a/b", data=str(texts)))
    assert (mixed.calibration.sources, mixed.calibration.shares) == ((str(texts), "self"), (1.0, 3.0))
    ((_, alone),) = prepare([file], RunOptions(model="a/b", data="self"))
    assert (alone.calibration.sources, alone.calibration.shares) == (("self",), ())
