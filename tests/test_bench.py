"""Each benchmark starts as its docstring says, and says what it takes."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import pytest

from mxfx import api
from mxfx.config import apply_overrides
from tools.bench import quality

ROOT = Path(__file__).parents[1]
BENCHES = sorted(
    path.stem for path in (ROOT / "tools" / "bench").glob("*.py") if "def main(" in path.read_text(encoding="utf-8")
)


def test_there_are_benchmarks():
    assert {"kernels", "prefill", "compiler", "lm_eval_time", "gpu_check"} <= set(BENCHES)


# As a script one would find its neighbour kernels.py where transformers looks for a package of that name.
@pytest.mark.parametrize("name", BENCHES)
def test_it_starts_as_a_module(name, monkeypatch, capsys):
    module = import_module(f"tools.bench.{name}")
    assert f"python -m tools.bench.{name}" in module.__doc__
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as stopped:
        module.main()
    assert stopped.value.code == 0
    assert "--json" in capsys.readouterr().out


@pytest.mark.parametrize("arm", quality.ARMS)
def test_every_arm_of_quality_is_a_pipeline_with_changes_that_it_takes(arm: str) -> None:
    file, *changes = quality.arm(arm)
    before = api.load_pipeline(ROOT / file)
    assert (apply_overrides(before, changes) != before) == bool(changes)
