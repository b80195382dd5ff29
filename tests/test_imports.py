"""Imports between the rooms of mxfx point one way (the order of the design).

Imports inside functions count, and so do look-ups by name: of a module, and of a pass through its registry.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "mxfx"
#: A room may import itself and those before it. `mxfx/__init__.py` names what the others define, so it is no room.
ROOMS = (
    "ground", "formats", "algorithms", "ops", "graph", "rewrite", "calibration", "passes", "config", "pipeline",
    "runtime", "evaluation", "export", "report", "driver", "compat", "api", "cli",
)  # fmt: skip


def room(parts: tuple[str, ...]) -> str:
    """The room of a file; ``python -m mxfx`` is the command line by another name."""
    return "cli" if parts == ("__main__.py",) else parts[0].removesuffix(".py")


FILES = [path for path in sorted(ROOT.rglob("*.py")) if path.relative_to(ROOT).parts != ("__init__.py",)]


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every module of mxfx that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.split(".")[0] == "mxfx")
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield node.lineno, "." * node.level + (node.module or "")
        elif isinstance(node, ast.ImportFrom) and node.module == "mxfx":
            yield from ((node.lineno, f"mxfx.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("mxfx."):
            yield node.lineno, node.module
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            yield from looked_up(node, node.args[0].value)


def looked_up(call: ast.Call, name: object) -> Iterator[tuple[int, str]]:
    """What a call with a literal name fetches: ``find_pass("lower")``, ``import_module("mxfx.api")``."""
    function = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if function == "find_pass":
        yield call.lineno, f"mxfx.passes.{name}"
    elif function in ("import_module", "__import__") and str(name).startswith("mxfx."):
        yield call.lineno, str(name)


def is_earlier(name: str, here: int) -> bool:
    target = name.split(".")[1]
    return target in ROOMS and ROOMS.index(target) <= here


def test_every_file_lies_in_a_room_of_the_design() -> None:
    assert {room(path.relative_to(ROOT).parts) for path in FILES} <= set(ROOMS)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_to_earlier_rooms(path: Path) -> None:
    here = ROOMS.index(room(path.relative_to(ROOT).parts))
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for line, name in imported(path)
        if name != "mxfx" and not is_earlier(name, here)
    ]
    assert wrong == []


def test_imports_in_functions_are_seen(tmp_path: Path) -> None:
    file = tmp_path / "late.py"
    file.write_text("def f():\n    from mxfx.cli import app\n    import mxfx.api\n    from . import x\n")
    assert list(imported(file)) == [(2, "mxfx.cli"), (3, "mxfx.api"), (4, ".")]


def test_lookups_by_name_are_seen(tmp_path: Path) -> None:
    file = tmp_path / "borrowed.py"
    file.write_text('find_pass("lower")()\nrewrite.find_pass("gptq")\nimport_module("mxfx.api")\nfind_pass(name)\n')
    assert sorted(imported(file)) == [(1, "mxfx.passes.lower"), (2, "mxfx.passes.gptq"), (3, "mxfx.api")]


def test_tests_for_cuda_are_collected_without_hypothesis() -> None:
    """Its native module is not to be had on every machine with a device."""
    tests = ROOT.parent / "tests"

    def names(path: Path, seen: set[str]) -> set[str]:
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        found = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
        found += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        for name in found:
            file = ROOT.parent.joinpath(*name.split(".")).with_suffix(".py")
            if name not in seen:
                seen.add(name)
                if name.startswith("tests.") and file.is_file():
                    names(file, seen)
        return seen

    marked = [path for path in sorted(tests.rglob("test_*.py")) if "mark.cuda" in path.read_text()]
    assert len(marked) >= 6
    for path in (*marked, tests / "conftest.py"):
        assert not any(name.startswith("hypothesis") for name in names(path, set())), path


def test_no_file_is_longer_than_400_lines() -> None:
    lengths = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8").count("\n") for path in FILES}
    assert {name: count for name, count in lengths.items() if count > 400} == {}
