"""One entry of a pipeline: a pass's name, its options as they were written, and where."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mxfx.config import options
from mxfx.config.errors import ConfigError
from mxfx.config.locate import Cursor
from mxfx.ground.nearest import did_you_mean
from mxfx.rewrite import Pass, UnknownPass, all_passes, find_pass

NOWHERE = Cursor("<pipeline>", {})


@dataclass(frozen=True)
class PassSpec:
    """A pass by name with the options that were set, in TOML form.

    ``value`` is the typed pass, or None while no pass of that name is registered: such an entry can be
    printed and converted, and ``typed`` raises. ``at`` finds the places of its options.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    at: Cursor = field(default=NOWHERE, compare=False)
    value: Pass | None = None

    @classmethod
    def of(cls, pass_: Pass) -> PassSpec:
        """The entry of a typed pass: what differs from the defaults counts as set."""
        return cls(pass_.name, options.write_fields(pass_), NOWHERE, pass_)

    @classmethod
    def read(cls, name: str, raw: Mapping[str, Any], at: Cursor) -> PassSpec:
        """Check ``raw`` against the pass's fields; an unregistered name stays as it is written.

        Raises ``ConfigError`` at the first bad key or value.
        """
        if name not in all_passes():
            return cls(name, raw, at)
        value = options.read_dataclass(find_pass(name), raw, at, f"pass {name!r}")
        return cls(name, options.write_fields(value, frozenset(raw)), at, value)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PassSpec):
            return NotImplemented
        if self.value is not None and other.value is not None:
            return self.value == other.value
        return (self.name, self.options) == (other.name, other.options)

    def __hash__(self) -> int:
        return hash(self.name)

    def typed(self) -> Pass:
        """The pass. Raises ``ConfigError`` if no pass of that name is registered."""
        if self.value is None:
            raise unknown_pass(self.name, self.at)
        return self.value

    def with_option(self, path: tuple[str | int, ...], raw: object, at: Cursor) -> PassSpec:
        """This entry with one option (or a part of one, such as ``("rule", 0, "weight")``) set to ``raw``.

        ``at`` is where the new value stands. Raises ``ConfigError`` there.
        """
        marks = {key: mark for key, mark in self.at.moved().marks.items() if key[: len(path)] != path}
        if at.marks:
            marks[path] = at.marks[at.path]
        here = Cursor(self.at.source, marks)
        if self.value is None:
            return PassSpec(self.name, {**self.options, _only(path, at): raw}, here)
        value = _replace(self.value, path, raw, at, f"pass {self.name!r}")
        return PassSpec(self.name, options.write_fields(value, frozenset(self.options) | {str(path[0])}), here, value)


def unknown_pass(name: str, at: Cursor) -> ConfigError:
    known = all_passes()
    try:
        find_pass(name)
    except UnknownPass:
        hint = did_you_mean(name, known)
        names = options.listed(sorted(known))
        return at.error(f"unknown pass {name!r}", f"one of {names}", hint)
    raise AssertionError(f"{name} is registered")


def _only(path: tuple[str | int, ...], at: Cursor) -> str:
    if len(path) != 1:
        raise at.error("this pass is not available, so only whole options can be set")
    return str(path[0])


def _replace(value: Any, path: tuple[str | int, ...], raw: object, at: Cursor, what: str) -> Any:
    """A copy of a dataclass with the item at ``path`` read from ``raw``."""
    name, rest = path[0], path[1:]
    if name not in options.fields(type(value)):
        raise at.error(
            f"unknown key {name!r} in {what}",
            f"one of {options.listed(options.fields(type(value)))}",
            did_you_mean(str(name), options.fields(type(value))),
            of_key=True,
        )
    attribute = options.fields(type(value))[str(name)].name
    old = getattr(value, attribute)
    new = _replace_item(old, rest, raw, at, f"{name} of {what}") if rest else _read_field(value, str(name), raw, at)
    try:
        return dataclasses.replace(value, **{attribute: new})
    except ConfigError:
        raise
    except ValueError as error:
        raise at.error(str(error)) from error


def _read_field(value: Any, name: str, raw: object, at: Cursor) -> Any:
    return options.read(options.hint_of(type(value), name), raw, at)


def _replace_item(old: Any, path: tuple[str | int, ...], raw: object, at: Cursor, what: str) -> Any:
    if not isinstance(old, tuple):
        return _replace(old, path, raw, at, what) if dataclasses.is_dataclass(old) else _no_item(at, what)
    index, rest = path[0], path[1:]
    if not isinstance(index, int) or not rest or index >= len(old):
        raise at.error(f"{what} has {len(old)} items", f"[0] … [{len(old) - 1}] and a key of that item", of_key=True)
    return (*old[:index], _replace(old[index], rest, raw, at, what), *old[index + 1 :])


def _no_item(at: Cursor, what: str) -> Any:
    raise at.error(f"{what} has no parts", "a whole option", of_key=True)
