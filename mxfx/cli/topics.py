"""``mxfx help``: pages of the package by name."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from typing import Annotated

import typer

from mxfx.ground.errors import MxfxError
from mxfx.ground.nearest import did_you_mean


class NoTopic(MxfxError, ValueError):
    """There is no page of that name."""


def topics() -> Mapping[str, str]:
    """Every page by its name, sorted; the first line of each says what it is about, behind ``#``."""
    pages = sorted((files("mxfx.cli") / "pages").iterdir(), key=lambda page: page.name)
    return {page.name.removesuffix(".md"): page.read_text(encoding="utf-8") for page in pages}


def help_(topic: Annotated[str | None, typer.Argument(help="A page; all are listed without.")] = None) -> None:
    """Pages on formats, passes, pipeline files, selectors, calibration, evaluation, exports, caches; with examples."""
    pages = topics()
    if topic is None:
        width = max(map(len, pages))
        for name, text in pages.items():
            typer.echo(f"{name:{width}}  {text.partition(chr(10))[0].removeprefix('# ')}")
        typer.echo("\nmxfx help TOPIC prints one; mxfx COMMAND --help tells of a command.")
        return
    if topic not in pages:
        near = f" {near}" if (near := did_you_mean(topic, pages)) else ""
        raise NoTopic(f"there is no topic {topic!r};{near} expected one of {', '.join(pages)}")
    typer.echo(pages[topic].rstrip("\n"))


COMMANDS = {"help": help_}
