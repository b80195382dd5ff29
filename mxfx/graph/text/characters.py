"""Reading lines character by character, with the place of every error."""

from __future__ import annotations

import json
import re

import torch

from mxfx.graph.text.words import BY_NAME, TextError

_JSON = json.JSONDecoder()
_TYPE = re.compile(r"\w+\[[^\]]*\]|sym\((?:[^()]|\([^()]*\))*\)|\(.*?\)(?= |$)|\?")


class Lines:
    """Lines of a text, and where in them the reader stands: line ``number`` from 1, character ``at`` from 0."""

    def __init__(self, lines: list[str]) -> None:
        self.lines = lines
        self.number = 0
        self.line = ""
        self.at = 0

    def advance(self) -> bool:
        """Go to the next line that is neither empty nor a comment (``// …``)."""
        while self.number < len(self.lines):
            self.line = self.lines[self.number].rstrip()
            self.number += 1
            self.at = 0
            if self.line and not self.line.startswith("//"):
                return True
        self.line = ""
        return False

    def until_type_end(self) -> str:
        found = _TYPE.match(self.line, self.at)
        if found is None:
            raise self.error("expected a type such as bf16[batch, seq, 64]")
        self.at = found.end()
        return found[0]

    def json(self) -> dict:
        try:
            value, self.at = _JSON.raw_decode(self.line, self.at)
        except ValueError as error:
            raise self.error(f"expected JSON: {error}") from error
        return value

    def string(self) -> str:
        value = self.json()
        if not isinstance(value, str):
            raise self.error("expected a string")
        return value

    def pattern(self, pattern: re.Pattern[str]) -> str:
        found = pattern.match(self.line, self.at)
        if found is None:
            raise self.error(f"unexpected {self.line[self.at : self.at + 20]!r}")
        self.at = found.end()
        return found[0]

    def take(self, text: str) -> bool:
        if not self.line.startswith(text, self.at):
            return False
        self.at += len(text)
        return True

    def expect(self, text: str) -> None:
        if not self.take(text):
            raise self.error(f"expected {text!r}, found {self.line[self.at : self.at + 20]!r}")

    def finish(self) -> None:
        if self.at != len(self.line):
            raise self.error(f"unexpected {self.line[self.at : self.at + 20]!r} behind the node")

    def dtype_of(self, name: str) -> torch.dtype:
        dtype = BY_NAME.get(name) or getattr(torch, name, None)
        if not isinstance(dtype, torch.dtype):
            raise self.error(f"unknown dtype {name!r}")
        return dtype

    def error(self, problem: str) -> TextError:
        """The error of what stands here: line, column, and a caret under it."""
        column = min(self.at, len(self.line))
        return TextError(f"line {self.number}, column {column + 1}: {problem}\n  {self.line}\n  {' ' * column}^")
