"""Each benchmark starts as its docstring says, and says what it takes."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import pytest

BENCHES = sorted(
    path.stem
    for path in (Path(__file__).parents[1] / "tools" / "bench").glob("*.py")
    if "def main(" in path.read_text(encoding="utf-8")
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
