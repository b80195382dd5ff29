"""Progress bars on standard error for steps that take seconds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def announced(description: str, total: int | None) -> str:
    """The line that stands for a bar: what begins, and of how many steps."""
    return description if total is None else f"{description} ({total} step{'' if total == 1 else 's'})"


def on_terminal() -> bool:
    """Whether standard error is a terminal, which shows bars; a log gets lines."""
    from rich.console import Console

    return Console(stderr=True).is_terminal


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yield ``items`` under a bar with the time that is left; the bar disappears when it is done.

    Where standard error is no terminal, but a log file, it gets one line for the whole bar.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    # A description names files: nothing in it is markup.
    console = Console(stderr=True, markup=False, emoji=False)
    if not console.is_terminal:
        console.print(announced(description, total), soft_wrap=True)
        yield from items
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        yield from progress.track(items, total=total, description=description)
