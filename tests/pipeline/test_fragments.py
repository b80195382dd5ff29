"""Passes on parts of graphs: each case of ``tests/filecheck/fragments`` has the graph before and the graph after in it.

// PASSES: NAME            the pass, with its options
// words
the graph before, as ``mxfx opt -`` reads it
// AFTER
what ``mxfx opt -`` prints
// -----                   the next case
"""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from mxfx import cli
from mxfx.config.pipeline import register_passes
from mxfx.graph.text import SEPARATOR, TextError, parse_fragment
from mxfx.pipeline.opt import opt_fragments
from mxfx.rewrite import all_passes

FOLDER = Path(__file__).parents[1] / "filecheck" / "fragments"
FILES = sorted(FOLDER.glob("*.mxir"))
PASSES, AFTER = "// PASSES: ", "// AFTER\n"


def read(path: Path) -> tuple[str, list[tuple[str, str]]]:
    """The pass of a file, and graph before and text after of each case."""
    first, _, rest = path.read_text().partition("\n")
    assert first.startswith(PASSES), f"{path.name} names no pass"
    cases = [case.split(AFTER) for case in rest.split(f"{SEPARATOR}\n")]
    return first.removeprefix(PASSES), [(before, after) for before, after in cases]


def graph(text: str) -> str:
    """A text without its comments."""
    return "\n".join(line for line in text.splitlines() if not line.startswith("//"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_pass_makes_of_each_graph_what_the_file_says(path: Path) -> None:
    passes, cases = read(path)
    assert opt_fragments(f"\n{SEPARATOR}\n".join(before for before, _ in cases), passes) == f"{SEPARATOR}\n".join(
        after for _, after in cases
    )


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_no_case_would_pass_without_the_pass(path: Path) -> None:
    """The mutation: the pass is left out. A refusal leaves the graph as it is, and says so."""
    _, cases = read(path)
    refusals = 0
    for before, after in cases:
        untouched = opt_fragments(before, "")
        refused = after.startswith("// error: ") or ": 0 matched, " in after.splitlines()[0]
        refusals += refused
        assert untouched != after
        assert refused or graph(untouched) != graph(after) or " changed by " in after
        if refused and not after.startswith("// error: "):
            assert graph(untouched) == graph(after)
    assert 3 <= len(cases) <= 6 and 1 <= refusals < len(cases) - 1


def test_every_file_is_of_a_pass() -> None:
    register_passes()
    assert FILES and {path.stem for path in FILES} <= all_passes().keys()
    assert all(read(path)[0].startswith(path.stem) for path in FILES)


LINEAR = (
    "weights\n  @w : f32[4, 8]\ngraph\n  %x = input : bf16[batch, 8]\n  %y = aten.linear(%x, @w) : bf16[batch, 4]\n"
)


def test_the_command_reads_parts_of_graphs_from_standard_input() -> None:
    said = CliRunner().invoke(cli.app, ["opt", "-"], input=f"{LINEAR}  return %y\n{SEPARATOR}\n{LINEAR}  return %y\n")
    assert said.exit_code == 0 and said.stdout.count("graph\n") == 2 and SEPARATOR in said.stdout


def test_weights_follow_from_seed_and_name() -> None:
    first, second, other = (parse_fragment(f"{LINEAR}  return %y\n", seed).weights.hash("w") for seed in (0, 0, 1))
    assert first == second != other


def test_an_error_has_its_line_in_the_whole_text_its_column_and_a_caret() -> None:
    text = f"{LINEAR}  return %y\n{SEPARATOR}\ngraph\n  %x = input : bf16[batch, 8]\n  return %z\n"
    with pytest.raises(TextError) as raised:
        opt_fragments(text, "")
    assert str(raised.value) == "line 10, column 12: %z is read before it is defined\n    return %z\n             ^"
