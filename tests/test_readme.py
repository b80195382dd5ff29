"""What README shows works: its first pipeline, its pass, its formats."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch

from mxfx.config import Pipeline, loads
from mxfx.graph.tiny import tiny
from mxfx.graph.trace import trace
from mxfx.pipeline.instruments import Numbers
from mxfx.pipeline.manager import PassManager

README_OF = Path(__file__).parents[1] / "README.md"
README = README_OF.read_text(encoding="utf-8")


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_first_pipeline_loads_and_fits_a_llama() -> None:
    (text,) = _blocks("toml")
    program = PassManager().run(trace(tiny("llama-tiny")), loads(text)).program
    assert {"weights-rounded", "activations-quantized"} <= program.facts


def test_the_pass_in_20_lines_runs_and_keeps_its_promise() -> None:
    (source,) = [block for block in _blocks("python") if "class HalveAndDouble" in block]
    # dataclasses looks its module up by name.
    space: dict[str, object] = {"__name__": __name__}
    exec(compile(source, "README.md", "exec", dont_inherit=True), space)
    pipeline = Pipeline([space["HalveAndDouble"]()]).completed()
    result = PassManager([Numbers()]).run(trace(tiny("llama-tiny")), pipeline)
    assert len(result.records[-1].matches) == 2
    assert result.steps[-1].findings["numerics"]["error"] < 1e-12


def test_the_format_example_keeps_shape_and_dtype() -> None:
    (source,) = [block for block in _blocks("python") if "fake_quantize" in block]
    space: dict[str, object] = {"x": torch.randn(2, 64)}
    exec(compile(source.replace("parse(", "y = parse(", 1), "README.md", "exec", dont_inherit=True), space)
    assert space["y"].shape == (2, 64) and space["y"].dtype == torch.float32


def test_every_benchmark_is_listed_beside_its_figures() -> None:
    bench = README_OF.parent / "tools" / "bench"
    listed = set(re.findall(r"^\| `(\w+)` \|", (bench / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert listed == {file.stem for file in bench.glob("*.py")} - {"measuring", "__init__"}


def test_commits_that_figures_name_are_in_the_history() -> None:
    """Of what lands after a rebase the hash before it is nobody's."""
    root = README_OF.parent

    def git(*command: str) -> str | None:
        done = subprocess.run(["git", "-C", root, *command], capture_output=True, text=True, check=False)
        return done.stdout if done.returncode == 0 else None

    if git("rev-parse", "--is-shallow-repository") != "false\n":
        pytest.skip("no whole history here")
    tracked = (git("ls-files", "*.md", "*.toml", "mxfx/*.py", "tools/*.py") or "").split()
    text = "\n".join((root / file).read_text(encoding="utf-8") for file in tracked)
    # A hash among other words, or a number that is called one.
    named = set(re.findall(r"\b(?=\d*[a-f])(?=[a-f]*\d)[0-9a-f]{7}\b|(?<=commit )[0-9a-f]{7}\b", text))
    assert len(named) >= 8
    assert [name for name in sorted(named) if git("merge-base", "--is-ancestor", name, "HEAD") is None] == []
