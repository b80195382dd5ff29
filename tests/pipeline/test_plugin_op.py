"""A package that brings, through entry points alone, an op, a kernel for it, a raise pass and a rounding pass."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.local_model import save_model

ROOT = Path(__file__).parents[2]
_PIPELINE = """
[model]
name = "MODEL"
dtype = "float32"
[[pass]]
name = "raise-linear-add"
[[pass]]
name = "annotate"
partial = true
[[pass.rule]]
type = "linear_add"
weight = "mxint4@32"
input = "mxint4@32"
expect = "2 * layers"
[[pass]]
name = "insert-fake-quant"
[[pass]]
name = "round-shrunk"
factor = 0.5
"""

Mxfx = Callable[..., str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the package is installed, beside a model and a pipeline."""
    folder = tmp_path_factory.mktemp("package")
    source = folder / "source"
    shutil.copytree(ROOT / "tests" / "plugin_example", source)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, "--target", folder / "target", source], check=True, capture_output=True, text=True)
    (folder / "p.toml").write_text(_PIPELINE.replace("MODEL", str(save_model(folder / "llama"))))
    return folder


@pytest.fixture(scope="module")
def mxfx(folder: Path) -> Mxfx:
    """The command line in a process that has the package."""

    def run(*arguments: object) -> str:
        said = subprocess.run(
            [sys.executable, "-c", "from mxfx.cli import main; main()", *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": f"{folder / 'target'}{os.pathsep}{ROOT}"},
            capture_output=True,
            text=True,
        )
        assert said.returncode == 0, said.stderr[-4000:]
        return said.stdout

    return run


@pytest.fixture(scope="module")
def result(folder: Path, mxfx: Mxfx) -> dict:
    """What a run with all instruments wrote of the pipeline, with what it printed as ``said``."""
    said = mxfx("run", folder / "p.toml", "--out", folder / "out", "-v")
    (_, config) = json.loads((folder / "out/results.json").read_text())["configs"]
    return {**config, "said": said}


def test_its_passes_rewrite_and_keep_their_promises(result: dict) -> None:
    passes = {step["pass"]: step for step in result["passes"]}
    assert [passes[n]["matched"] for n in ("raise-linear-add", "insert-fake-quant", "round-shrunk")] == [4, 4, 4]
    assert passes["raise-linear-add"]["findings"]["numerics"]["promise"] == "exact"
    assert passes["round-shrunk"]["findings"]["ledger"]["kl"] > 0


def test_its_op_is_dumped_and_verified_like_any_other(result: dict, folder: Path) -> None:
    dumps = sorted((folder / "out/p/ir").glob("*round-shrunk*"))
    assert sum(file.read_text().count("mxfx.linear_add(") for file in dumps[0].glob("graph.txt")) == 4
    assert "verify" in next(step for step in result["passes"] if step["pass"] == "round-shrunk")["findings"]


def test_its_op_is_covered_by_what_it_says_of_itself(result: dict) -> None:
    products = {p["path"]: p for p in result["coverage"]["products"]}
    assert (
        products["model.layers.*.self_attn.o_proj"]["four_bit"] and products["model.layers.*.mlp.down_proj"]["four_bit"]
    )
    assert not products["model.layers.*.mlp.up_proj"]["four_bit"]
    states = {(o["kind"], o["operand"]): o["state"] for o in result["coverage"]["operands"]}
    assert states["linear_add", "weight"] == "rounded" and states["linear_add", "input"] == "quantized"


def test_lower_takes_its_kernel_where_it_fits_and_says_where_it_does_not(result: dict) -> None:
    (lower,) = (step for step in result["passes"] if step["pass"] == "lower")
    told = {row["path"].split(".")[-1]: row for row in lower["details"]["providers"] if row["op"] == "linear_add"}
    assert (told["o_proj"]["provider"], told["o_proj"]["reason"]) == ("narrow-linear-add", "")
    assert told["down_proj"]["provider"] is None
    assert told["down_proj"]["reason"] == "narrow-linear-add: 96 input channels, it holds 64"
    assert "linear_add of 2 nodes by narrow-linear-add" in result["said"]
    assert "linear_add of 2 nodes by its definition: narrow-linear-add: 96 input channels" in result["said"]


def test_the_emitted_graph_calls_its_kernel_and_the_saved_one_its_op(result: dict, folder: Path) -> None:
    emitted = sorted((folder / "out/p/ir").glob("*lower"))[0] / "graph.txt"
    assert emitted.read_text().count("mxfx_kernels.linear_add(") == 2
    assert (folder / "out/p/model/program.mxir").read_text().count("mxfx.linear_add(") == 4


def test_bisect_names_its_rounding_pass(folder: Path, mxfx: Mxfx) -> None:
    assert "round-shrunk" in mxfx("bisect", folder / "p.toml", "--max-kl", "1e-3")


def test_no_line_of_mxfx_knows_of_it() -> None:
    assert not [f for f in (ROOT / "mxfx").rglob("*.py") if "linear_add" in f.read_text(encoding="utf-8")]
