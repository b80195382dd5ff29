"""Every pipeline of passes_configs/ runs on a tiny model: sizes cut, nothing else changed."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import tomli

from mxfx.calibration.sources import OPENING
from tests.commands import Run
from tests.local_model import save_model, save_texts

CONFIGS = sorted((Path(__file__).parents[1] / "passes_configs").glob("*.toml"))
_CUT = {
    "distill": ("steps=2", "batch_size=2", "compile=false"),
    "transform-inputs": ("samples=4",),
    "transform-kv": ("samples=4",),
    "allocate-bits": ("samples=2",),
    "rotation-search": ('sites=["q_proj", "kv_cache"]',),
}


def cuts(file: Path) -> list[str]:
    """Assignments that make a file's passes small."""
    raw = tomli.loads(file.read_text())
    names = [one["name"] for one in raw.get("pass", [])]
    names += ["rotation-search"] if "rotation_search" in raw else []
    small = [f"pass.{name}.{cut}" for name in dict.fromkeys(names) for cut in _CUT.get(name, ())]
    # Samples that go on from openings are longer than those.
    length = OPENING + 8 if raw.get("calibration", {}).get("continued") else 16
    return ["calibration.samples=4", f"calibration.length={length}", 'model.dtype="float32"', *small]


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_a_pipeline_runs(file: Path, mxfx: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Files of the dialect name their caches relative to where they run.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(os.environ, "MXFX_CACHE", str(tmp_path / "cache"))
    model, texts = save_model(tmp_path / "llama"), save_texts(tmp_path / "texts", documents=4)
    changes = [word for cut in cuts(file) for word in ("--set", cut)]
    given = ("--model", model, "--data", texts, "--eval", texts, *changes)
    said = mxfx("run", file, *given, "--out", tmp_path / "out")
    assert said.code == 0, said.err
    _, config = json.loads((tmp_path / "out" / "results.json").read_text())["configs"]
    domain = config["evaluation"]["domains"]["texts"]
    assert domain["divergence"]["mean"] > 0 and math.isfinite(domain["token_perplexity"])
    assert (tmp_path / "out" / file.stem / "model" / "config.json").is_file()


def test_all_pipelines_are_here() -> None:
    assert len(CONFIGS) >= 9
