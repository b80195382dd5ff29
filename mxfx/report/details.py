"""What passes decided and found, as HTML: transforms by site, searches step by step, losses by linear.

A pass leaves JSON values under names of its own choice; tables are found in them by their shape.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from mxfx.report.render import called, render


def decisions(passes: Sequence[Mapping[str, Any]]) -> Markup:
    """One folded block for each pass that left details; nothing if none did."""
    return render("decisions.html", told=[_told(called(step), step["details"]) for step in passes if step["details"]])


def _told(
    name: str, details: Mapping[str, Any]
) -> tuple[str, list[tuple[str, str]], list[tuple], list[tuple], list[tuple]]:
    """The pass, what it says in words, tables, charts and bars; details that are a table themselves need no name."""
    if _is_table(details):
        return name, [], [("", *_rows(details))], [], []
    charts = [(key, *_chart(value)) for key, value in details.items() if _is_chart(value)]
    bars = [(key, _bars(value["bars"])) for key, value in details.items() if _is_bars(value)]
    rest = {key: value for key, value in details.items() if not (_is_chart(value) or _is_bars(value))}
    plain = [(key, _text(value)) for key, value in rest.items() if not _is_table(value)]
    return name, plain, [(key, *_rows(value)) for key, value in rest.items() if _is_table(value)], charts, bars


def _is_bars(value: Any) -> bool:
    return isinstance(value, Mapping) and set(value) == {"bars"}


def _bars(values: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    """Of each name its value as text, and its height in percent of the highest."""
    highest = max(map(float, values.values()), default=0.0) or 1.0
    return [(name, _text(value), 100 * float(value) / highest) for name, value in values.items()]


def _is_chart(value: Any) -> bool:
    return isinstance(value, Mapping) and set(value) == {"curve", "points"}


def _chart(value: Mapping[str, Any]) -> tuple[list[tuple[float, float]], list[tuple[str, float, float]], list[str]]:
    """Places in percent, from the left and from the top, of a curve ``[[x, y], …]`` and of named points, which have
    an x and a y in this order; y is drawn as its logarithm. Last the ends of both axes, as text.
    """
    curve = [(float(x), float(y)) for x, y in value["curve"]]
    points = [(name, *map(float, point.values())) for name, point in value["points"].items()]
    least = min((y for _, y in curve if y > 0), default=1.0)
    xs = [x for x, _ in curve] + [x for _, x, _ in points]
    ys = [math.log10(max(y, least)) for y in [y for _, y in curve] + [y for *_, y in points]]
    left, right, low, high = min(xs), max(xs), min(ys), max(ys)

    def place(x: float, y: float) -> tuple[float, float]:
        up = (math.log10(max(y, least)) - low) / ((high - low) or 1.0)
        return 100 * (x - left) / ((right - left) or 1.0), 100 * (1 - up)

    ends = [f"{left:.3g}", f"{right:.3g}", f"{10**low:.3g}", f"{10**high:.3g}"]
    return [place(*at) for at in curve], [(f"{name}: {x:.4g}, {y:.4g}", *place(x, y)) for name, x, y in points], ends


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
