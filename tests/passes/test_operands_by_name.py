"""Passes ask for operands by their names in the catalogue: no pass counts where an operand stands."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import mxfx.passes

#: Passes that still take operands apart by place: those of one op of the emit stage, in the order of its schema.
COUNTED = frozenset({"multiply_in_fp8.py"})


def counted(source: str) -> Iterator[int]:
    """Lines that index ``args``, slice it, or take it apart into names."""
    for node in ast.walk(ast.parse(source)):
        taken_apart = isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple)
        if (taken_apart or isinstance(node, ast.Subscript)) and _is_args(node.value):
            yield node.lineno


def _is_args(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "args"


@pytest.mark.parametrize("line", ["x = node.args[0]", "y = node.args[1:3]", "a, *_ = node.args", "f(n.args[at])"])
def test_what_counts_is_found(line: str) -> None:
    assert list(counted(line)) == [1] and not list(counted("x = rw.call(node.target, *node.args)"))


def test_no_pass_counts_operands() -> None:
    files = sorted(Path(mxfx.passes.__file__).parent.glob("*.py"))
    found = {file.name: lines for file in files if (lines := list(counted(file.read_text(encoding="utf-8"))))}
    assert len(files) > 30 and not {name: lines for name, lines in found.items() if name not in COUNTED}
