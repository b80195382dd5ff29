"""One kind of error for everything a user can get wrong in a pipeline: where, what, what was expected."""

from __future__ import annotations

from dataclasses import dataclass

from mxfx.ground.errors import MxfxError


@dataclass(frozen=True)
class Place:
    """A position in a text: ``FILE:LINE:COLUMN``, both counted from 1; ``text`` is that line.

    ``line`` 0 means that the value never was text (a Python dictionary): only the source's name is known.
    """

    source: str
    line: int = 0
    column: int = 0
    text: str = ""

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}" if self.line else self.source


class ConfigError(MxfxError, ValueError):
    """A pipeline that cannot be run as it is written.

    The message starts with ``FILE:LINE:COLUMN:`` and what is wrong; below it the line with a caret, what was
    expected, and what to do. ``place``, ``problem``, ``expected`` and ``hint`` hold the parts.
    """

    def __init__(self, place: Place, problem: str, expected: str = "", hint: str = "") -> None:
        self.place = place
        self.problem = problem
        self.expected = expected
        self.hint = hint
        super().__init__(self._message())

    def _message(self) -> str:
        lines = [f"{self.place}: {self.problem}"]
        if self.place.line:
            lines += [f"  {self.place.text}", "  " + _pad(self.place) + "^"]
        if self.expected:
            lines.append(f"  expected: {self.expected}")
        if self.hint:
            lines.append(f"  {self.hint}")
        return "\n".join(lines)


def _pad(place: Place) -> str:
    """Blanks up to the caret; tabs stay tabs, so that the caret stands below its character."""
    return "".join("\t" if c == "\t" else " " for c in place.text[: place.column - 1])
