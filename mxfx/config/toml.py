"""Canonical TOML of a pipeline: what ``mxfx config show`` prints and a run directory keeps."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from mxfx.config.options import fields, write_fields
from mxfx.config.pipeline import Pipeline, settings_of
from mxfx.config.spec import PassSpec

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_LITERAL = re.compile(r"[^'\x00-\x1f\x7f]*")


def to_toml(pipeline: Pipeline, *, defaults: bool = False) -> str:
    """The pipeline as TOML that loads back to an equal one.

    Settings are printed with all their values, options of passes as they were set; ``defaults`` adds the
    options that keep their default.
    """
    blocks = [] if pipeline.specs else ["pass = []\n"]
    blocks += [_table(f"[{name}]", values, (name,), "") for name, values in settings_of(pipeline).items()]
    blocks += [_table("[[pass]]", _entry(spec, defaults), ("pass",), "") for spec in pipeline.specs]
    return "\n".join(blocks)


def _entry(spec: PassSpec, defaults: bool) -> dict[str, Any]:
    written = spec.options
    if defaults and spec.value is not None:
        written = write_fields(spec.value, frozenset(fields(type(spec.value))))
    return {"name": spec.name, **written}


def _table(header: str, values: Mapping[str, Any], path: tuple[str, ...], indent: str) -> str:
    """A table: plain values aligned, then sub-tables and arrays of tables, indented."""
    plain = {key: item for key, item in values.items() if not _is_nested(item)}
    width = max((len(_key(key)) for key in plain), default=0)
    lines = [indent + header]
    lines += [f"{indent}{_key(key):<{width}} = {_value(item)}" for key, item in plain.items()]
    text = "\n".join(lines) + "\n"
    for key, item in values.items():
        below = (*path, key)
        name = ".".join(_key(part) for part in below)
        if isinstance(item, Mapping):
            text += _table(f"[{name}]", item, below, indent + "  ")
        elif _is_nested(item):
            text += "".join(_table(f"[[{name}]]", entry, below, indent + "  ") for entry in item)
    return text


def _is_nested(item: Any) -> bool:
    return isinstance(item, Mapping) or (
        isinstance(item, list | tuple) and bool(item) and all(isinstance(entry, Mapping) for entry in item)
    )


def _key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else quoted(key)


def _value(item: Any) -> str:
    if isinstance(item, bool):
        return str(item).lower()
    if isinstance(item, str):
        return json_string(item) if _LITERAL.fullmatch(item) and "\\" not in item and '"' not in item else quoted(item)
    if isinstance(item, list | tuple):
        return "[" + ", ".join(_value(entry) for entry in item) + "]"
    if isinstance(item, Mapping):
        return "{" + ", ".join(f"{_key(key)} = {_value(entry)}" for key, entry in item.items()) + "}"
    return repr(item)


def quoted(text: str) -> str:
    """A TOML string: literal where possible (regular expressions stay readable), else with escapes."""
    return f"'{text}'" if _LITERAL.fullmatch(text) else json_string(text)


def json_string(text: str) -> str:
    """A basic TOML string; TOML's escapes are those of JSON, but it also forbids a raw DEL."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
