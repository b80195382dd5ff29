"""Where each key of a TOML text stands: key path -> line and column.

``tomli`` gives values without positions. This scanner walks a text that ``tomli`` has already accepted,
so it checks nothing; it only has to know where tokens end.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import tomli

from mxfx.config.errors import ConfigError, Place
from mxfx.ground.nearest import did_you_mean

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True)
class Mark:
    """Where a key stands and where its value begins (for a table: its header, twice)."""

    key: Place
    value: Place


@dataclass(frozen=True)
class Cursor:
    """A value inside a document: knows its key path and its place, or the place of what surrounds it."""

    source: str
    marks: Mapping[KeyPath, Mark]
    path: KeyPath = ()

    def __truediv__(self, key: str | int) -> Cursor:
        return Cursor(self.source, self.marks, (*self.path, key))

    def below(self, path: KeyPath) -> Cursor:
        return Cursor(self.source, self.marks, (*self.path, *path))

    def moved(self) -> Cursor:
        """The same cursor with its path as the new root: the marks that it can reach, relative to it."""
        depth = len(self.path)
        inside = {path[depth:]: mark for path, mark in self.marks.items() if path[:depth] == self.path}
        return Cursor(self.source, inside)

    def place(self, *, of_key: bool = False) -> Place:
        """The place of the value (or of its key); of the nearest table around it if it has none itself."""
        for end in range(len(self.path), -1, -1):
            mark = self.marks.get(self.path[:end])
            if mark is not None:
                return mark.key if of_key or end < len(self.path) else mark.value
        return Place(self.source)

    def error(self, problem: str, expected: str = "", hint: str = "", *, of_key: bool = False) -> ConfigError:
        place = self.place(of_key=of_key)
        if not place.line and self.path:
            problem = f"at {dotted(self.path)}: {problem}"
        return ConfigError(place, problem, expected, hint)


def dotted(path: KeyPath) -> str:
    """``pass[3].rule[0].match``."""
    text = ""
    for key in path:
        text += f"[{key}]" if isinstance(key, int) else f".{key}" if text else key
    return text


@dataclass(frozen=True)
class Document:
    """A parsed text and the cursor at its root."""

    value: dict
    root: Cursor


def read_toml(path: str | Path) -> Document:
    """Read a TOML file with the places of its keys.

    Raises ``ConfigError`` for a missing or unreadable file and, with line and column, for a syntax error.
    """
    file = Path(path)
    if file.is_dir():
        raise ConfigError(Place(str(path)), "a folder", "a TOML pipeline, a file")
    if not file.is_file():
        raise ConfigError(Place(str(path)), "no such file", "a TOML pipeline", _near_file(file))
    try:
        text = file.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ConfigError(Place(str(path)), f"not UTF-8 text: {error}", "a TOML pipeline") from error
    return parse_toml(text, str(path))


def parse_toml(text: str, source: str) -> Document:
    """Parse TOML text with the places of its keys. Raises ``ConfigError`` for a syntax error."""
    try:
        value = tomli.loads(text)
    except tomli.TOMLDecodeError as error:
        raise _syntax_error(error, text, source) from error
    return Document(value, Cursor(source, locate(text, source)))


def locate(text: str, source: str) -> dict[KeyPath, Mark]:
    """Key path -> where key and value stand, for every key of a valid TOML text (LF or CRLF)."""
    return _Scanner(text, source).run()


def _near_file(file: Path) -> str:
    folder = file.parent
    return did_you_mean(file.name, [f.name for f in folder.iterdir()]) if folder.is_dir() else ""


def _syntax_error(error: tomli.TOMLDecodeError, text: str, source: str) -> ConfigError:
    lines = text.splitlines() or [""]
    place = Place(source, error.lineno, error.colno, lines[error.lineno - 1] if error.lineno <= len(lines) else "")
    return ConfigError(place, f"not valid TOML: {error.msg[0].lower()}{error.msg[1:]}")


_BARE = re.compile(r"[A-Za-z0-9_-]+")
_BLANK = re.compile(r"[ \t]*")
_GAP = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_SCALAR = re.compile(r"[^,\]}#\r\n]*")


class _Scanner:
    """One walk over the text. ``at`` is the offset of the next character."""

    def __init__(self, text: str, source: str) -> None:
        self.text = text
        self.source = source
        self.at = 0
        self.marks: dict[KeyPath, Mark] = {}
        self.counts: dict[KeyPath, int] = {}
        self.starts = [0, *(m.end() for m in re.finditer("\n", text))]

    def run(self) -> dict[KeyPath, Mark]:
        prefix: KeyPath = ()
        self.skip(_GAP)
        while self.at < len(self.text):
            if self.text[self.at] == "[":
                prefix = self.header()
            else:
                self.pair(prefix)
            self.skip(_GAP)
        return self.marks

    def header(self) -> KeyPath:
        place = self.place()
        is_array = self.text.startswith("[[", self.at)
        self.at += 2 if is_array else 1
        keys = self.keys()
        self.at += 2 if is_array else 1
        path: KeyPath = ()
        for key, _ in keys[:-1]:
            path = self.entered((*path, key))
            self.marks.setdefault(path, Mark(place, place))
        path = (*path, keys[-1][0])
        self.marks.setdefault(path, Mark(place, place))
        if is_array:
            self.counts[path] = self.counts.get(path, 0) + 1
            path = self.entered(path)
        self.marks[path] = Mark(place, place)
        return path

    def entered(self, path: KeyPath) -> KeyPath:
        """A path through an array of tables means its last table."""
        return (*path, self.counts[path] - 1) if path in self.counts else path

    def pair(self, prefix: KeyPath) -> None:
        keys = self.keys()
        self.at += 1
        self.skip(_BLANK)
        path = prefix
        for key, place in keys:
            path = (*path, key)
            self.marks.setdefault(path, Mark(place, place))
        self.marks[path] = Mark(keys[-1][1], self.place())
        self.value(path)

    def keys(self) -> list[tuple[str, Place]]:
        """A dotted key; the offset ends behind it and behind blanks."""
        keys = []
        while True:
            self.skip(_BLANK)
            place = self.place()
            keys.append((self.key(), place))
            self.skip(_BLANK)
            if not self.text.startswith(".", self.at):
                return keys
            self.at += 1

    def key(self) -> str:
        start = self.at
        if self.text[start] in "'\"":
            self.string()
            return next(iter(tomli.loads(self.text[start : self.at] + "=0")))
        self.skip(_BARE)
        return self.text[start : self.at]

    def value(self, path: KeyPath) -> None:
        char = self.text[self.at]
        if char in "'\"":
            self.string()
        elif char == "[":
            self.array(path)
        elif char == "{":
            self.inline_table(path)
        else:
            self.skip(_SCALAR)

    def array(self, path: KeyPath) -> None:
        self.at += 1
        index = 0
        self.skip(_GAP)
        while self.text[self.at] != "]":
            place = self.place()
            self.marks[(*path, index)] = Mark(place, place)
            self.value((*path, index))
            index += 1
            self.separator()
        self.at += 1

    def inline_table(self, path: KeyPath) -> None:
        self.at += 1
        self.skip(_GAP)
        while self.text[self.at] != "}":
            self.pair(path)
            self.separator()
        self.at += 1

    def separator(self) -> None:
        self.skip(_GAP)
        if self.text[self.at] == ",":
            self.at += 1
            self.skip(_GAP)

    def string(self) -> None:
        quote = self.text[self.at]
        fence = quote * 3 if self.text.startswith(quote * 3, self.at) else quote
        self.at += len(fence)
        while not self.text.startswith(fence, self.at):
            self.at += 2 if quote == '"' and self.text[self.at] == "\\" else 1
        self.at += len(fence)
        while len(fence) == 3 and self.text.startswith(quote, self.at):  # up to two quotes may end the text itself
            self.at += 1

    def skip(self, pattern: re.Pattern[str]) -> None:
        found = pattern.match(self.text, self.at)
        self.at = found.end() if found else self.at

    def place(self) -> Place:
        return place_at(self.text, self.at, self.source, self.starts)


def place_at(text: str, offset: int, source: str, starts: list[int] | None = None) -> Place:
    """The place of a character offset; ``starts`` are the offsets of the lines, if already known."""
    starts = starts or [0, *(m.end() for m in re.finditer("\n", text))]
    line = bisect_right(starts, offset)
    begin = starts[line - 1]
    end = text.find("\n", begin)
    whole = text[begin:] if end < 0 else text[begin:end]
    return Place(source, line, offset - begin + 1, whole.rstrip("\r"))
