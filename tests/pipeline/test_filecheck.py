"""Every file of ``tests/filecheck`` does what its ``RUN`` line says, through ``mxfx opt`` and LLVM's FileCheck."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from filecheck.matcher import Matcher
from filecheck.options import Options
from typer.testing import CliRunner

from mxfx import api, cli
from mxfx.config.pipeline import register_passes
from mxfx.pipeline.opt import load_source
from mxfx.rewrite import all_passes

pytestmark = pytest.mark.usefixtures("definitions")

FOLDER = Path(__file__).parents[1] / "filecheck"
FILES = sorted(FOLDER.glob("*.mxir"))


@pytest.fixture(scope="module", autouse=True)
def traced_once() -> Iterator[None]:
    """A built-in model is traced once for all files; passes work on copies."""
    patch = pytest.MonkeyPatch()
    patch.setattr(api, "load_source", cache(load_source))
    yield
    patch.undo()


def run_lines(path: Path) -> list[str]:
    return [line.removeprefix("// RUN: ") for line in path.read_text().splitlines() if line.startswith("// RUN: ")]


def execute(line: str, path: Path, folder: Path) -> None:
    """``mxfx opt … | filecheck %s``, the only form in use."""
    command, _, checker = line.partition(" | ")
    words = shlex.split(command)
    assert words[:2] == ["mxfx", "opt"] and checker == "filecheck %s", line
    said = CliRunner().invoke(cli.app, words[1:])
    assert said.exit_code == 0, said.exception or said.output
    printed = folder / "printed"
    printed.write_text(said.stdout)
    status = Matcher.from_opts(Options(match_filename=str(path), input_file=str(printed))).run()
    assert status == 0, f"{path.name} is not satisfied (see stderr) by:\n{said.stdout}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_the_printed_graph_is_as_stated(path: Path, tmp_path: Path) -> None:
    lines = run_lines(path)
    assert lines, f"{path.name} has no RUN line"
    for line in lines:
        execute(line, path, tmp_path)


def test_every_pass_has_a_file() -> None:
    register_passes()
    own = {name for name, cls in all_passes().items() if cls.__module__.startswith("mxfx.passes.")}
    assert own == {path.stem for path in FILES}


def test_a_file_that_states_something_else_fails(tmp_path: Path) -> None:
    path = tmp_path / "wrong.mxir"
    path.write_text("// CHECK: mxfx.nothing\n")
    with pytest.raises(AssertionError, match="is not satisfied"):
        execute("mxfx opt llama-tiny --passes raise-norm | filecheck %s", path, tmp_path)
