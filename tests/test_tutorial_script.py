"""The tutorial, told with mxfx, runs in its short form: figures, the search's decisions, plots."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from tests.local_model import save_model, save_texts
from tools import tutorial


def test_the_tutorial_runs_in_its_short_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = dataclasses.replace(tutorial.SHORT, samples=2, length=16, evaluated=80, window=32)
    monkeypatch.setattr(tutorial, "SHORT", small)
    texts = save_texts(tmp_path / "texts", documents=4)
    model = save_model(tmp_path / "model")
    given = ["--short", "--model", str(model), "--calibration", str(texts), "--evaluation", str(texts)]
    result = tutorial.main([*given, "--out", str(tmp_path / "out")])
    figures = result["figures"]
    assert list(figures) == ["float", "A", "B", "C"]
    assert figures["float"]["kl"] == pytest.approx(0, abs=1e-6)
    assert all(figures[name]["kl"] > 0 and figures[name]["word_perplexity"] > 1 for name in "ABC")
    assert json.loads((tmp_path / "out" / "tutorial.json").read_text()) == result
    assert result["search"]["perplexity"] <= result["search"]["baseline"]
    assert (tmp_path / "out" / "gptq").is_dir()
    for name in ("perplexity", "search"):
        assert "<svg" in (tmp_path / "out" / f"{name}.svg").read_text()
    assert "C rotates" in capsys.readouterr().out


def test_without_matplotlib_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert list(tutorial.plots({}, {}, tmp_path)) == []
    assert "pip install 'mxfx[bench]'" in capsys.readouterr().out
