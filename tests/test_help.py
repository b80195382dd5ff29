"""``mxfx help`` and examples of ``--help`` tell of what there is: commands, options, files, pipelines that parse."""

from __future__ import annotations

import io
import re
import shlex
from pathlib import Path

import pytest
import typer
from rich.text import Text

from mxfx import cli
from mxfx.cli.examples import EXAMPLES
from mxfx.cli.topics import topics
from mxfx.compat.tutorial import from_tutorial, is_tutorial
from mxfx.config import loads
from mxfx.config.locate import parse_toml
from mxfx.formats import parse
from tests.commands import Run

_ROOT = Path(__file__).parents[1]
_GROUP = typer.main.get_command(cli.app)
_PAGES = topics()


def calls(text: str) -> list[list[str]]:
    """Every call of mxfx in a text, as words: in a line of its own, or between backticks."""
    lines = [line.strip() for line in text.splitlines() if line.strip().startswith("mxfx ")]
    # A dollar of a shell, a comment, a pipe or an ellipsis ends a call.
    written = [*lines, *re.findall(r"`(mxfx [^`]+)`", text)]
    return [shlex.split(re.split(r" [|>#…] ?|  +", call)[0].removesuffix(" …")) for call in written]


def check_call(words: list[str]) -> None:
    """Raises ``AssertionError`` for a command or an option that there is not, or a file of ours that is not there."""
    command, rest = _GROUP, words[1:]
    while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        assert rest[0] in command.commands or rest[0] == "COMMAND", words
        if rest[0] == "COMMAND":
            return
        command, rest = command.commands[rest[0]], rest[1:]
    known = {option for one in command.params for option in (*one.opts, *one.secondary_opts)} | {"--help"}
    for word in rest:
        assert not word.startswith("--") or word.split("=")[0] in known, f"{' '.join(words)}: no option {word}"
        assert not word.startswith("passes_configs/") or (_ROOT / word).is_file(), word


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@pytest.mark.parametrize("name", _PAGES)
def test_a_page_names_what_there_is(name: str) -> None:
    text = _PAGES[name]
    assert re.match(r"# .+\n\n", text)
    assert max(map(len, text.splitlines())) <= 130
    for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        assert len({row.count("|") for row in table.splitlines()}) == 1, table
    for call in calls(text):
        check_call(call)
    for block in blocks(text, "toml"):
        document = parse_toml(block, f"{name}.md")
        assert from_tutorial(document.value, document.root) if is_tutorial(document) else loads(block)
    for block in blocks(text, "python"):
        compile(block, f"{name}.md", "exec")


def test_formats_of_the_page_are_formats() -> None:
    (table,) = re.findall(r"\| --- \| --- \| --- \|\n((?:\|.*\n)+)", _PAGES["formats"])
    names = [name for row in table.splitlines() for name in re.findall(r"[a-z0-9_]+(?:@\w+)?", row.split("|")[1])]
    assert len(names) >= 10
    for name in names:
        assert parse(name.replace("@B", "@32"))


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_can_be_called(name: str) -> None:
    assert all(
        call.startswith(f"mxfx {name.split()[0]}") or "| mxfx" in call or "mxfx eval" in call for call in EXAMPLES[name]
    )
    for example in EXAMPLES[name]:
        for call in calls(example):
            check_call(call)


def test_every_command_has_examples_below_its_options(mxfx: Run) -> None:
    top = set(_GROUP.commands) - {"config"}  # type: ignore[attr-defined]
    assert top | {"config show", "config schema"} == set(EXAMPLES)
    said = mxfx("bisect", "--help")
    assert "mxfx bisect OUT/NAME --max-kl 0.1" in said.out


def test_help_lists_pages_and_prints_one(mxfx: Run) -> None:
    listed = mxfx("help").out
    assert {"formats", "passes", "pipeline", "selectors", "calibration", "evaluation", "export", "cache", "faq"} <= set(
        _PAGES
    )
    assert all(name in listed for name in _PAGES)
    assert mxfx("help", "formats").out == _PAGES["formats"]
    wrong = mxfx("help", "format")
    assert wrong.code == 2 and "did you mean 'formats'? expected one of cache, " in wrong.err
    assert "no topic 'gguf'; expected one of cache, " in mxfx("help", "gguf").err


def test_a_call_that_does_not_exist_is_seen() -> None:
    for call in ("mxfx rnu FILE", "mxfx run --evl x", "mxfx run passes_configs/none.toml"):
        with pytest.raises(AssertionError):
            check_call(calls(call)[0])


def test_help_shows_what_is_written(mxfx: Run) -> None:
    """Typer reads help as rich's markup: it ate ``[table]``, and made ``main:train:`` a picture."""
    for name, examples in EXAMPLES.items():
        if " " in name:
            continue
        shown = "".join(mxfx(name, "--help").out.split())
        for example in examples:
            assert "".join(example.split()) in shown, (name, example)
    for command in _GROUP.commands.values():
        for one in command.params:
            written = getattr(one, "help", None) or ""
            assert Text.from_markup(written).plain == written, (command.name, one.name)


def test_a_name_between_colons_stays_one(mxfx: Run, tmp_path: Path) -> None:
    said = mxfx("compare", tmp_path / "a:train:b", tmp_path)
    assert said.code == 2 and "a:train:b" in said.err
    cli.err.file = cli.out.file = written = io.StringIO()
    try:
        cli.err.print("x:train:y")
        cli.out.print("x:train:y")
    finally:
        cli.err.file, cli.out.file = None, None
    assert written.getvalue().split() == ["x:train:y"] * 2
