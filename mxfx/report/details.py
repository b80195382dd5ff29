"""What passes decided and found, as HTML: transforms by site, searches step by step, losses by linear.

A pass leaves JSON values under names of its own choice; tables are found in them by their shape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from mxfx.report.render import render


def decisions(passes: Sequence[Mapping[str, Any]]) -> Markup:
    """One folded block for each pass that left details; nothing if none did."""
    return render("decisions.html", told=[_told(step["pass"], step["details"]) for step in passes if step["details"]])


def _told(name: str, details: Mapping[str, Any]) -> tuple[str, list[tuple[str, str]], list[tuple]]:
    """The pass, what it says in words, and its tables; details that are a table themselves need no name."""
    if _is_table(details):
        return name, [], [("", *_rows(details))]
    plain = [(key, _text(value)) for key, value in details.items() if not _is_table(value)]
    return name, plain, [(key, *_rows(value)) for key, value in details.items() if _is_table(value)]


def _is_table(value: Any) -> bool:
    rows = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return len(rows) > 0 and all(isinstance(row, Mapping) and row for row in rows)


def _rows(table: Mapping[str, Mapping] | Sequence[Mapping]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Columns, and the cells of each row by its name."""
    named = table if isinstance(table, Mapping) else {str(i): row for i, row in enumerate(table, start=1)}
    columns = list(dict.fromkeys(key for row in named.values() for key in row))
    return columns, [(name, [_text(row.get(key, "–")) for key in columns]) for name, row in named.items()]


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(inner)}" for key, inner in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(_text, value)) or "none"
    return str(value)
