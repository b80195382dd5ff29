"""``mxfx …`` through its entry point, in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from mxfx import cli


@dataclass(frozen=True)
class Said:
    """What a command ended with."""

    code: int
    out: str
    err: str


Run = Callable[..., Said]


PIPELINE = """
[model]
name = "MODEL"
dtype = "float32"

[[pass]]
name = "annotate"
partial = true
  [[pass.rule]]
  role   = "down_proj"
  weight = "mxint4@32"
  input  = "mxint4@32"

[[pass]]
name = "round-weights"

[[pass]]
name = "insert-fake-quant"
"""


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a user has after a run, to be copied by who changes it: a model in ``hf``, ``texts``, the pipeline
    ``p.toml``, and the directory ``out`` of a run that evaluated it on them.
    """
    from tests.local_model import save_model, save_texts

    root = tmp_path_factory.mktemp("finished")
    model, texts = save_model(root / "hf"), save_texts(root / "texts")
    (root / "p.toml").write_text(PIPELINE.replace("MODEL", str(model)))
    evaluated = ("--eval", "wikitext", "--eval-data", texts)
    with pytest.MonkeyPatch.context() as patch:
        assert ended(patch, "run", root / "p.toml", *evaluated, "--out", root / "out") == 0
    return root


def ended(patch: pytest.MonkeyPatch, *args: object) -> int:
    """The code that ``mxfx …`` ends with."""
    patch.setattr(sys, "argv", ["mxfx", *map(str, args)])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    return int(exit_.value.code or 0)


@pytest.fixture
def mxfx(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run ``mxfx …``."""

    def run(*args: object) -> Said:
        code = ended(monkeypatch, *args)
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Said(code, captured.out, captured.err)

    return run
