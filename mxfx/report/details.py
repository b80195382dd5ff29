"""What passes decided and found, as HTML: transforms by site, searches step by step, losses by linear.

A pass leaves JSON values under names of its own choice; tables are found in them by their shape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any


def decisions(passes: Sequence[Mapping[str, Any]]) -> str:
    """One folded block for each pass that left details; nothing if none did."""
    told = [step for step in passes if step.get("details")]
    if not told:
        return ""
    blocks = "".join(
        f"<details><summary>{escape(step['pass'])}</summary>{_details(step['details'])}</details>" for step in told
    )
    return f"<h3>What passes decided</h3>{blocks}"


def _details(details: Mapping[str, Any]) -> str:
    if _is_table(details):
        return _rows(details)
    plain = {key: value for key, value in details.items() if not _is_table(value)}
    text = "".join(f"<li>{escape(_said(key))}: {escape(_text(value))}</li>" for key, value in plain.items())
    tables = "".join(
        f"<p class='soft'>{escape(_said(key))}</p>{_rows(value)}" for key, value in details.items() if _is_table(value)
    )
    return (f"<ul>{text}</ul>" if text else "") + tables


def _is_table(value: Any) -> bool:
    rows = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return len(rows) > 0 and all(isinstance(row, Mapping) and row for row in rows)


def _rows(table: Mapping[str, Mapping] | Sequence[Mapping]) -> str:
    named = table if isinstance(table, Mapping) else {str(i): row for i, row in enumerate(table, start=1)}
    columns = list(dict.fromkeys(key for row in named.values() for key in row))
    heads = "".join(f"<th>{escape(_said(name))}</th>" for name in ("", *columns))
    body = "".join(
        f"<tr><td class='path'>{escape(name)}</td>"
        + "".join(f"<td>{escape(_text(row.get(column, '–')))}</td>" for column in columns)
        + "</tr>"
        for name, row in named.items()
    )
    return (
        f'<div class="wide"><table class="decided"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _said(name: str) -> str:
    return name.replace("_", " ")


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(inner)}" for key, inner in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(_text, value)) or "none"
    return str(value)
