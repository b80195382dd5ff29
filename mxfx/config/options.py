"""Typed fields of a frozen dataclass <-> TOML values.

The type annotation of a field is the whole declaration: ``read`` checks a TOML value against it, ``write``
turns the typed value back, ``schema`` describes it as JSON Schema. Ranges are the dataclass's own business: a
``ValueError`` from its ``__post_init__`` that names a field (in quotes, backticks or as its first word) is
cited at that field.
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
import math
import re
import types
import typing
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from mxfx.config.errors import ConfigError
from mxfx.config.locate import Cursor
from mxfx.formats import Format, parse
from mxfx.ground.nearest import did_you_mean
from mxfx.rewrite import Selector


@dataclasses.dataclass(frozen=True)
class _Written:
    """A type that TOML writes as one string."""

    read: Callable[[str], object]
    write: Callable[[Any], str]
    expected: str
    schema: Mapping[str, object]


_WRITTEN: dict[type, _Written] = {
    str: _Written(str, str, "a string", {"type": "string"}),
    Path: _Written(Path, str, "a path in quotes", {"type": "string"}),
    Format: _Written(
        parse,
        str,
        'a format in quotes, such as "mxint4@32"',
        {"type": "string", "examples": ["mxint4@32/mse"]},
    ),
    Selector: _Written(
        Selector.read,
        str,
        'a regular expression that whole module paths match, or clauses such as "role: mlp; layers: 0-3", in quotes',
        {
            "type": "string",
            "examples": [r".*\.mlp\..*", "role: down_proj, o_proj; layers: 0-3, -1; except: .*shared.*"],
        },
    ),
}

_PLAIN: dict[type, tuple[str, str]] = {
    bool: ("true or false", "boolean"),
    int: ("a whole number", "integer"),
    float: ("a number", "number"),
}


def read(hint: Any, raw: object, at: Cursor) -> Any:
    """The typed value of ``raw``. Raises ``ConfigError`` at ``at`` for a wrong type or a bad value."""
    if hint in _PLAIN:
        return _read_plain(hint, raw, at)
    if hint in _WRITTEN:
        return _read_written(_WRITTEN[hint], raw, at)
    if get_origin(hint) is Literal:
        return _read_choice(get_args(hint), raw, at)
    if _is_union(hint):
        one, several = _members(hint)
        return read(several if several is not None and isinstance(raw, list | tuple) else one, raw, at)
    if get_origin(hint) is tuple:
        return _read_tuple(hint, raw, at)
    if inspect.isclass(hint) and issubclass(hint, enum.Enum):
        return hint(_read_choice(tuple(member.value for member in hint), raw, at))
    if dataclasses.is_dataclass(hint):
        return read_dataclass(typing.cast(type, hint), raw, at)
    raise TypeError(f"option type {hint!r} has no form in a pipeline file")


def read_dataclass(cls: type, raw: object, at: Cursor, what: str = "") -> Any:
    """An instance of ``cls`` from a TOML table. ``what`` names the table in messages."""
    what = what or f"[{cls.__name__.lower()}]"
    if not isinstance(raw, Mapping):
        raise at.error(f"{what} is {_kind(raw)}", f"a table with {listed(fields(cls))}")
    for key in raw:
        if key not in fields(cls):
            raise unknown_key(key, cls, at, what)
    values = {key: read(hint_of(cls, key), value, at / key) for key, value in raw.items()}
    for key, field in fields(cls).items():
        if key not in values and is_required(field):
            raise at.error(f"{what} lacks the key {key!r}", expected(hint_of(cls, key)))
    return construct(cls, values, at)


def construct(cls: type, values: Mapping[str, object], at: Cursor) -> Any:
    """``cls(**values)``; a range error of ``__post_init__`` becomes a ``ConfigError`` at the key that it
    names.
    """
    try:
        return cls(**{fields(cls)[key].name: value for key, value in values.items()})
    except ConfigError:
        raise
    except ValueError as error:
        raise blame(cls, error, at, values) from error


def blame(cls: type, error: ValueError, at: Cursor, values: Mapping[str, object]) -> ConfigError:
    """The error at the field that its message names, else at the table."""
    message = str(error)
    quoted = [name for name in re.findall(r"['\"`](\w+)['\"`]", message) if name in values]
    words = [name for name in re.findall(r"\w+", message) if name in values]
    named = (quoted or words)[:1]
    return (at / named[0] if named else at).error(message)


def unknown_key(key: str, cls: type, at: Cursor, what: str) -> ConfigError:
    names = fields(cls)
    wanted = f"one of {listed(names)}" if names else f"no key: {what} has no options"
    return (at / key).error(f"unknown key {key!r} in {what}", wanted, did_you_mean(key, names), of_key=True)


def _read_plain(hint: type, raw: object, at: Cursor) -> object:
    if hint is float and type(raw) is int:
        return float(raw)
    if type(raw) is not hint:
        raise _wrong(hint, raw, at)
    return raw


def _read_written(form: _Written, raw: object, at: Cursor) -> object:
    if not isinstance(raw, str):
        raise at.error(f"{_shown(raw)} is {_kind(raw)}", form.expected)
    try:
        return form.read(raw)
    except ValueError as error:
        raise at.error(str(error), "" if "expected" in str(error) else form.expected) from error


def _read_choice(choices: tuple[object, ...], raw: object, at: Cursor) -> object:
    # 1 == True in Python, so the types have to agree as well
    if any(raw == choice and type(raw) is type(choice) for choice in choices):
        return raw
    words = [str(choice) for choice in choices]
    raise at.error(f"{_shown(raw)} is not one of the choices", f"one of {listed(words)}", did_you_mean(str(raw), words))


def _read_tuple(hint: Any, raw: object, at: Cursor) -> tuple:
    if not isinstance(raw, list | tuple):
        raise _wrong(hint, raw, at)
    return tuple(read(get_args(hint)[0], item, at / index) for index, item in enumerate(raw))


def _wrong(hint: Any, raw: object, at: Cursor) -> ConfigError:
    return at.error(f"{_shown(raw)} is {_kind(raw)}", expected(hint))


def write(value: Any) -> Any:
    """The TOML value (string, number, bool, list, dict) of a typed value. Raises ``ValueError`` for None."""
    if value is None:
        raise ValueError("None has no TOML form: leave the key out")
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list):
        return [write(item) for item in value]
    if type(value) in _WRITTEN:
        return _WRITTEN[type(value)].write(value)
    if isinstance(value, Path):
        return str(value)
    if dataclasses.is_dataclass(value):
        return write_fields(value)
    raise TypeError(f"{value!r} has no form in a pipeline file")


def write_fields(value: Any, always: frozenset[str] = frozenset()) -> dict[str, Any]:
    """The fields that differ from their defaults, and those in ``always``, in the order of declaration."""
    shown = {}
    for key, field in fields(type(value)).items():
        item = getattr(value, field.name)
        if item == default_of(field) and type(item) is type(default_of(field)) and key not in always:
            continue
        if item is None and key in always:
            continue
        shown[key] = _write_field(key, item)
    return shown


def _write_field(name: str, item: object) -> Any:
    try:
        return write(item)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def expected(hint: Any) -> str:
    """What a user may write for this type, in words."""
    if hint in _PLAIN:
        return _PLAIN[hint][0]
    if hint in _WRITTEN:
        return _WRITTEN[hint].expected
    if get_origin(hint) is Literal:
        return f"one of {listed([str(choice) for choice in get_args(hint)])}"
    if _is_union(hint):
        one, several = _members(hint)
        return expected(one) if several is None else f"{expected(one)}, or {expected(several)}"
    if get_origin(hint) is tuple:
        inner = get_args(hint)[0]
        return "an array of tables" if dataclasses.is_dataclass(inner) else f"an array, each item {expected(inner)}"
    if inspect.isclass(hint) and issubclass(hint, enum.Enum):
        return f"one of {listed([str(member.value) for member in hint])}"
    return f"a table with {listed(fields(hint))}"


def schema(hint: Any) -> dict[str, Any]:
    """JSON Schema (2020-12) of the type's TOML form."""
    if hint in _PLAIN:
        return {"type": _PLAIN[hint][1]}
    if hint in _WRITTEN:
        return dict(_WRITTEN[hint].schema)
    if get_origin(hint) is Literal:
        return {"enum": list(get_args(hint))}
    if _is_union(hint):
        one, several = _members(hint)
        return schema(one) if several is None else {"anyOf": [schema(one), schema(several)]}
    if get_origin(hint) is tuple:
        return {"type": "array", "items": schema(get_args(hint)[0])}
    if inspect.isclass(hint) and issubclass(hint, enum.Enum):
        return {"enum": [member.value for member in hint]}
    return dataclass_schema(hint)


def dataclass_schema(cls: type) -> dict[str, Any]:
    """JSON Schema of a table: every field with its type, its default and the docstring's words for it."""
    notes = field_notes(cls)
    properties = {}
    for key, field in fields(cls).items():
        entry = schema(hint_of(cls, key))
        if key in notes:
            entry["description"] = notes[key]
        if not is_required(field) and default_of(field) is not None:
            entry["default"] = write(default_of(field))
        properties[key] = entry
    described: dict[str, Any] = {"type": "object", "description": inspect.getdoc(cls) or ""}
    described |= {"properties": properties, "additionalProperties": False}
    required = [key for key, field in fields(cls).items() if is_required(field)]
    return described | ({"required": required} if required else {})


_NOTE = re.compile(r"^\s*(?:``)?(\w+)(?:``)?:\s+(.*)$")


def field_notes(cls: type) -> dict[str, str]:
    """Field -> its words, from docstring lines of the form ``field: words``, continued by deeper lines.

    A class inherits the words of its bases for the fields that it does not describe itself.
    """
    notes: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        notes |= _notes_in(inspect.cleandoc(base.__dict__.get("__doc__") or ""), frozenset(fields(cls)))
    return notes


def _notes_in(text: str, names: frozenset[str]) -> dict[str, str]:
    notes: dict[str, str] = {}
    current = ""
    for line in text.splitlines():
        found = _NOTE.match(line)
        if found and found[1] in names:
            current = found[1]
            notes[current] = found[2].strip()
        elif current and line.startswith("    ") and line.strip():
            notes[current] += " " + line.strip()
        else:
            current = ""
    return notes


def fields(cls: type) -> dict[str, dataclasses.Field]:
    """The options of a dataclass by their keys, in the order of declaration.

    A key is the field's name, but for one that is a word of Python: the key ``except`` is the field ``except_``.
    """
    return {field.name.removesuffix("_"): field for field in dataclasses.fields(cls) if field.init}


@lru_cache(maxsize=256)
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def hint_of(cls: type, key: str) -> Any:
    return _hints(cls)[fields(cls)[key].name]


def is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def default_of(field: dataclasses.Field) -> Any:
    """The field's default; ``dataclasses.MISSING`` if it must be given."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType)


def _members(hint: Any) -> tuple[Any, Any]:
    """``X`` and None of ``X | None``; ``X`` and ``tuple[X, ...]`` of ``X | tuple[X, ...]``, with or without None."""
    inner = [choice for choice in get_args(hint) if choice is not type(None)]
    if len(inner) == 1:
        return inner[0], None
    if len(inner) == 2 and get_origin(inner[1]) is tuple and get_args(inner[1])[0] == inner[0]:
        return inner[0], inner[1]
    raise TypeError(
        f"option type {hint!r}: of unions, only `X | None` and `X | tuple[X, ...]` have a form in a pipeline file"
    )


def listed(names: typing.Iterable[str]) -> str:
    return ", ".join(names)


def _shown(raw: object) -> str:
    return repr(raw) if not isinstance(raw, bool) else str(raw).lower()


def _kind(raw: object) -> str:
    if isinstance(raw, bool):
        return "a boolean"
    if isinstance(raw, float) and not math.isfinite(raw):
        return "not a finite number"
    kinds = {str: "a string", int: "a whole number", float: "a fraction", list: "an array", dict: "a table"}
    return kinds.get(type(raw), f"a {type(raw).__name__}")
