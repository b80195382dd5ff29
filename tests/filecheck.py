"""LLVM's FileCheck on printed programs: what a pass's graph looks like, stated as text."""

from __future__ import annotations

import tempfile
from pathlib import Path

from filecheck.matcher import Matcher
from filecheck.options import Options

from mxfx.graph.program import Program
from mxfx.graph.text import to_text


def check_printed(program: Program, directives: str) -> None:
    """Assert that the printed graph of ``program`` satisfies the ``CHECK`` lines; FileCheck prints where it stopped."""
    with tempfile.TemporaryDirectory() as folder:
        printed, checks = Path(folder, "program.ir"), Path(folder, "checks")
        printed.write_text(to_text(program, header=False), encoding="utf-8")
        checks.write_text(directives, encoding="utf-8")
        status = Matcher.from_opts(Options(match_filename=str(checks), input_file=str(printed))).run()
    assert status == 0, "the printed program does not satisfy its CHECK lines (see stderr)"
