"""Every error that mxfx raises on purpose is of one family, and no error is a traceback."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mxfx import cli
from mxfx.ground.errors import CheckError, MxfxError, exit_code

PACKAGE = Path(__file__).parents[1] / "mxfx"
#: Raised and caught inside one module: no caller sees them.
_INNER = {"_LastSeen"}


def exceptions() -> Iterator[tuple[str, list[str]]]:
    """Each class of the package whose name or base says that it is an exception, with its bases."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
                if any(base.endswith(("Error", "Exception", "Warning")) for base in bases):
                    yield node.name, bases


def test_every_exception_class_is_of_the_family() -> None:
    classes = {name: bases for name, bases in exceptions() if not any(base.endswith("Warning") for base in bases)}
    family = {"MxfxError"}
    while grown := {name for name, bases in classes.items() if family & set(bases)} - family:
        family |= grown
    assert set(classes) - family - _INNER == set()
    assert len(family) >= 25


def test_the_exit_code_is_that_of_the_innermost_cause() -> None:
    outer = MxfxError("a pass failed")
    assert exit_code(outer) == 2
    outer.__cause__ = CheckError("a promise is broken")
    assert exit_code(outer) == 1
    outer.__cause__ = TypeError("not ours")
    assert exit_code(outer) == 2


def test_a_fault_of_mxfx_is_one_message_and_exit_code_3(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(**options: object) -> None:
        raise TypeError("unsupported operand [/x]")

    monkeypatch.delenv("MXFX_TRACEBACK", raising=False)
    monkeypatch.setattr(cli, "app", broken)
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    said = capsys.readouterr().err
    assert exit_.value.code == cli.INTERNAL
    assert "internal error: TypeError: unsupported operand [/x]" in said
    assert "Traceback" not in said


def test_a_path_with_brackets_is_no_markup(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["mxfx", "config", "show", "mz[/x].toml"])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 2
    assert "mz[/x].toml: no such file" in capsys.readouterr().err
