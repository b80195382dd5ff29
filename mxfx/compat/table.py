"""Reading a table of the dialect so that no key is forgotten: each is taken, refused by name, or unknown."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from mxfx.config import options
from mxfx.config.locate import Cursor
from mxfx.ground.nearest import did_you_mean


class DialectWarning(UserWarning):
    """A key of the dialect that means less, or something else, here; the message names it, its place, what is done."""


class Table:
    """One table with its place. ``take`` what is understood, ``refuse`` what is not supported, ``close``."""

    def __init__(self, what: str, raw: object, at: Cursor) -> None:
        if not isinstance(raw, Mapping):
            raise at.error(f"{what} is {raw!r}", "a table")
        self.what = what
        self.raw: Mapping[str, Any] = raw
        self.at = at
        #: Operands that the table says to leave in the model's precision.
        self.left: set[str] = set()
        self._known: set[str] = set()
        self._refused: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return key in self.raw

    def take(self, key: str, hint: Any, default: Any = None) -> Any:
        """The typed value of ``key``, or ``default``. Raises ``ConfigError`` for a wrong type."""
        self._known.add(key)
        return options.read(hint, self.raw[key], self.at / key) if key in self.raw else default

    def ignore(self, key: str) -> None:
        """``key`` may be there, with any value, and is read elsewhere or means nothing here."""
        self._known.add(key)

    def need(self, key: str, hint: Any) -> Any:
        """As ``take``; a missing key is an error."""
        self._known.add(key)
        if key not in self.raw:
            raise self.at.error(f"{self.what} lacks the key {key!r}", options.expected(hint))
        return self.take(key, hint)

    def table(self, key: str) -> Table | None:
        """The table under ``key``, or None."""
        self._known.add(key)
        return Table(f"{key} of {self.what}", self.raw[key], self.at / key) if key in self.raw else None

    def require(self, key: str, hint: Any, only: object, why: str) -> None:
        """``key`` may be left out or be ``only``; any other value is refused."""
        value = self.take(key, hint, only)
        if value != only:
            self.fail(
                key,
                f"{key} = {value!r} is not supported: {why}",
                f"{key} = {str(only).lower()}, or leave it out",
            )

    def refuse(self, reasons: Mapping[str, str]) -> None:
        """Raise for the first of these keys that is there, with its reason."""
        self._refused |= reasons.keys()
        for key, reason in reasons.items():
            if key in self.raw:
                self.fail(key, f"{key!r} in {self.what} is not supported: {reason}")

    def warn(self, key: str, problem: str) -> None:
        """Say that a key is not honoured to the letter; see ``DialectWarning``."""
        warnings.warn(f"{(self.at / key).place(of_key=True)}: {problem}", DialectWarning, stacklevel=2)

    def fail(self, key: str, problem: str, expected: str = "", hint: str = "") -> NoReturn:
        raise (self.at / key).error(problem, expected, hint, of_key=True)

    def close(self, also: Iterable[str] = ()) -> None:
        """Raise ``ConfigError`` for the first key that nobody took."""
        known = self._known | set(also)
        for key in self.raw:
            if key not in known:
                self.fail(
                    key,
                    f"unknown key {key!r} in {self.what}",
                    f"one of {options.listed(sorted(known))}",
                    did_you_mean(key, known),
                )
