"""``mxfx compare`` on what ``mxfx run`` left: two seeds of one recipe are noise, two recipes are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from mxfx.evaluation.compare import compare
from tests.commands import Run
from tests.local_model import save_model, save_texts

RULES = """
[model]
name = "MODEL"
dtype = "float32"

[calibration]
dataset = "TEXTS"
samples = 96
length = 32

[[pass]]
name = "annotate"
  [[pass.rule]]
  match  = 'model\\.layers\\.\\d+\\..*_proj'
  weight = "mxint3@32"
  input  = "mxint4@32"
"""
NEAREST = RULES + '[[pass]]\nname = "round-weights"\n[[pass]]\nname = "insert-fake-quant"\n'
TUNED = (
    RULES
    + """
[[pass]]
name = "insert-fake-quant"

[[pass]]
name          = "distill"
steps         = 60
batch_size    = 8
learning_rate = 1e-2
"""
)


@pytest.fixture
def folders(mxfx: Run, tmp_path: Path) -> dict[str, Path]:
    """The folder with scores of each run: one recipe with two seeds, and another."""
    model = save_model(tmp_path / "llama")
    calibration = tmp_path / "calibration"
    save_texts(calibration, documents=4, words=1000)
    texts = tmp_path / "texts"
    save_texts(texts, documents=6, words=400)
    found = {}
    for name, text, seed in (("nearest", NEAREST, 0), ("tuned", TUNED, 0), ("again", TUNED, 1)):
        file = tmp_path / f"{name}.toml"
        file.write_text(text.replace("MODEL", str(model)).replace("TEXTS", str(calibration)))
        measured = ("--eval", "wikitext", "--eval-data", texts, "--set", f"calibration.seed={seed}")
        said = mxfx("run", file, *measured, "--out", tmp_path / "out" / name)
        assert said.code == 0, said.err
        found[name] = tmp_path / "out" / name / name
    return found


def test_two_seeds_are_inside_the_noise_and_two_recipes_are_not(mxfx: Run, folders: dict[str, Path]) -> None:
    seeds = {d.what: d for d in compare(folders["tuned"], folders["again"])}
    assert seeds["KL to float"].difference != 0  # they are two models
    assert {d.verdict for d in seeds.values()} == {"inside the noise"}
    assert next(d for d in compare(folders["nearest"], folders["tuned"]) if d.what == "KL to float").verdict == (
        "B is better"
    )
    said = mxfx("compare", folders["tuned"], folders["again"])
    assert said.code == 0 and said.out.count("inside the noise") == len(seeds) and " is better" not in said.out
    said = mxfx("compare", folders["nearest"], folders["tuned"])
    assert said.code == 0 and "B is better" in said.out and "A is better" not in said.out
