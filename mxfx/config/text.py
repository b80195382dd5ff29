"""The one-line form of a pipeline: ``fuse-norm,annotate{rule=[{match='…',
weight=mxint4@32}]},gptq{damp=0.01}``.

    pipeline = pass {"," pass}          pass  = NAME ["{" [pair {"," pair}] "}"]
    pair     = KEY "=" value            value = STRING | WORD | "[" [value {"," value}] "]" | "{" [pair {","
    pair}] "}"

A STRING is quoted as in TOML ('literal' or "with escapes"). A WORD is ``true``, ``false``, a number, or any
run of characters without blanks, quotes, brackets, commas and ``=``, which then is a string. The settings of
a pipeline are written as if they were passes in front: ``model{name=…},calibration{samples=8},fuse-norm``.
Blanks mean nothing.
"""

from __future__ import annotations

import re
from typing import Any

import tomli

from mxfx.config import options
from mxfx.config.errors import ConfigError
from mxfx.config.locate import Cursor, KeyPath, Mark, place_at
from mxfx.config.pipeline import SETTINGS, Pipeline, register_passes, settings_of
from mxfx.config.spec import PassSpec, unknown_pass
from mxfx.config.toml import quoted

_WORD = re.compile(r"[^\s'\"\[\]{},=]+")
_BLANK = re.compile(r"\s*")
_KEY = re.compile(r"[A-Za-z0-9_-]+")
_INTEGER = re.compile(r"[+-]?\d+")


def from_text(text: str, source: str = "--passes") -> Pipeline:
    """Parse the one-line form. The pipeline is exactly what is written; ``.completed()`` adds the raise
    passes.

    Raises ``ConfigError`` with line and column in ``text``; ``source`` names it.
    """
    register_passes()
    reader = _Reader(text, source)
    entries = reader.pipeline()
    root = Cursor(source, reader.marks)
    settings: dict[str, Any] = {}
    specs = []
    for index, (name, raw) in enumerate(entries):
        at = root / index
        if name in settings:
            raise at.error(f"{name!r} is given twice", f"one {name}{{…}}")
        if name in SETTINGS:
            settings[name] = options.read_dataclass(SETTINGS[name], raw, at, name)
        else:
            specs.append(_spec(name, raw, at))
    return Pipeline(specs, **settings, root=Cursor(source, reader.named))


def to_text(pipeline: Pipeline, *, settings: bool = True) -> str:
    """The canonical one-line form; without ``settings`` the passes alone."""
    tables = settings_of(pipeline) if settings else {}
    parts = [_entry(name, table) for name, table in tables.items()]
    return ",".join(parts + [_entry(spec.name, spec.options) for spec in pipeline.specs])


def _spec(name: str, raw: dict[str, Any], at: Cursor) -> PassSpec:
    spec = PassSpec.read(name, raw, at)
    if spec.value is None:
        raise unknown_pass(name, at)
    return spec


def _entry(name: str, table: Any) -> str:
    return name + (_printed(table) if table else "")


def _printed(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}={_printed(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(_printed(item) for item in value) + "]"
    if isinstance(value, str):
        return value if _is_plain(value) else quoted(value)
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _is_plain(text: str) -> bool:
    return "\\" not in text and _WORD.fullmatch(text) is not None and _word(text) == text


def _word(text: str) -> object:
    """What an unquoted word means."""
    if text in ("true", "false"):
        return text == "true"
    if _INTEGER.fullmatch(text):
        return int(text)
    try:
        return float(text)
    except ValueError:
        return text


class _Reader:
    """Recursive descent over one line. ``marks`` finds values by entry number, ``named`` settings by their
    name.
    """

    def __init__(self, text: str, source: str) -> None:
        self.text = text
        self.source = source
        self.at = 0
        self.marks: dict[KeyPath, Mark] = {}

    @property
    def named(self) -> dict[KeyPath, Mark]:
        return {
            (self.names[int(p[0])], *p[1:]): m for p, m in self.marks.items() if p and self.names[int(p[0])] in SETTINGS
        }

    def pipeline(self) -> list[tuple[str, dict[str, Any]]]:
        self.names: list[str] = []
        entries: list[tuple[str, dict[str, Any]]] = []
        self.marks[()] = self.mark()
        while self.peek() or not entries:
            entries.append(self.entry((len(entries),)))
            if not self.peek():
                break
            self.expect(",", "',' or the end")
        return entries

    def entry(self, path: KeyPath) -> tuple[str, dict[str, Any]]:
        self.peek()
        self.marks[path] = self.mark()
        name = self.take(_KEY, "the name of a pass")
        self.names.append(name)
        return name, (self.table(path) if self.peek() == "{" else {})

    def table(self, path: KeyPath) -> dict[str, Any]:
        table: dict[str, Any] = {}
        self.expect("{", "'{'")
        while self.peek() != "}":
            place = self.mark().key
            key = self.take(_KEY, "a key or '}'")
            if key in table:
                raise ConfigError(place, f"key {key!r} is given twice")
            self.expect("=", f"'=' after {key!r}")
            self.peek()
            self.marks[(*path, key)] = Mark(place, self.mark().value)
            table[key] = self.value((*path, key))
            self.separator("}")
        self.at += 1
        return table

    def array(self, path: KeyPath) -> list[Any]:
        items: list[Any] = []
        self.expect("[", "'['")
        while self.peek() != "]":
            self.marks[(*path, len(items))] = self.mark()
            items.append(self.value((*path, len(items))))
            self.separator("]")
        self.at += 1
        return items

    def separator(self, closing: str) -> None:
        if self.peek() != closing:
            self.expect(",", f"',' or {closing!r}")

    def value(self, path: KeyPath) -> Any:
        char = self.peek()
        if char == "{":
            return self.table(path)
        if char == "[":
            return self.array(path)
        if char and char in "'\"":
            return self.string(char)
        return _word(self.take(_WORD, "a value"))

    def string(self, quote: str) -> str:
        start = self.at
        pattern = r"'[^'\n]*'" if quote == "'" else r'"(?:\\.|[^"\\\n])*"'
        found = re.compile(pattern).match(self.text, start)
        if found is None:
            raise self.error(f"the string that starts here has no closing {quote}")
        try:
            value = tomli.loads("v=" + found[0])["v"]
        except tomli.TOMLDecodeError as error:
            raise self.error(f"bad escape in {found[0]}", "the escapes of TOML, or a 'literal' string") from error
        self.at = found.end()
        return value

    def peek(self) -> str:
        """The next character that is no blank; ``""`` at the end."""
        blank = _BLANK.match(self.text, self.at)
        self.at = blank.end() if blank else self.at
        return self.text[self.at : self.at + 1]

    def take(self, pattern: re.Pattern[str], wanted: str) -> str:
        found = pattern.match(self.text, self.at)
        if found is None:
            raise self.error(self.unexpected(), wanted)
        self.at = found.end()
        return found[0]

    def expect(self, char: str, wanted: str) -> None:
        if self.peek() != char:
            raise self.error(self.unexpected(), wanted)
        self.at += 1

    def unexpected(self) -> str:
        return f"unexpected {self.text[self.at]!r}" if self.at < len(self.text) else "the text ends here"

    def error(self, problem: str, expected: str = "") -> ConfigError:
        return ConfigError(place_at(self.text, self.at, self.source), problem, expected)

    def mark(self) -> Mark:
        place = place_at(self.text, self.at, self.source)
        return Mark(place, place)
