"""What a pass changed, as text: the edited regions with a little context, never the whole graph."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from mxfx.graph.program import Program
from mxfx.graph.text import Line, Printout


@dataclass(frozen=True)
class Region:
    """Neighbouring lines that changed, with context; each line starts with ``" "``, ``"-"``, ``"+"`` or
    ``"~"`` (reads others).
    """

    path: str
    lines: tuple[str, ...]

    @property
    def shape(self) -> str:
        """The changed lines without numbers and hashes: equal for the same edit in every layer."""
        changed = (line for line in self.lines if line[0] in "-+")
        return "\n".join(
            re.sub(r"\d+", "N", re.sub(r"#\w+|_\d+\b|@[\w.]+|%\w+", "", line)) for line in changed
        ) or "".join(self.lines)


def diff(before: Program | Printout, after: Program | Printout, context: int = 3, *, collapse: bool = True) -> str:
    """The regions that differ, ``@@ module path @@`` above each; ``""`` if the programs print alike.

    ``collapse`` shows an edit that repeats in every layer once, and names the other places.
    """
    old = before if isinstance(before, Printout) else Printout.of(before)
    new = after if isinstance(after, Printout) else Printout.of(after)
    parts = [_header_diff(old.header, new.header)]
    regions = regions_between(old.graph, new.graph, context)
    for alike in _grouped(regions) if collapse else [[r] for r in regions]:
        parts.append(_shown(alike))
    return "".join(parts)


def regions_between(old: list[Line], new: list[Line], context: int = 3) -> list[Region]:
    """The changed regions of two printed graphs, in order.

    A line that only reads other values than before (``~``) opens no region of its own: it follows from one that does.
    If nothing else changed, it counts.
    """
    return _regions(old, new, context, _structure) or _regions(old, new, context, _whole)


def _regions(old: list[Line], new: list[Line], context: int, key: Callable[[Line], str]) -> list[Region]:
    matcher = difflib.SequenceMatcher(None, [key(line) for line in old], [key(line) for line in new], autojunk=False)
    changes: list[tuple[int, int, int, int]] = []
    for tag, i1, i2, j1, j2 in matcher.get_opcodes():
        if tag == "equal":
            continue
        if changes and i1 - changes[-1][1] <= 1:
            first = changes.pop()
            changes.append((first[0], i2, first[2], j2))
        else:
            changes.append((i1, i2, j1, j2))
    before = {line.name: line for line in old}
    return [_region(old, new, before, change, context) for change in changes]


def _region(
    old: list[Line],
    new: list[Line],
    before: Mapping[str, Line],
    change: tuple[int, int, int, int],
    context: int,
) -> Region:
    i1, i2, j1, j2 = change
    # What stands around a change is the same in both graphs, up to the next change: the new graph's lines are shown.
    above = [_kept(before, line) for line in new[max(0, j1 - context) : j1]]
    below = [_kept(before, line) for line in new[j2 : j2 + context]]
    edited = [f"- {line.text}" for line in old[i1:i2]] + [f"+ {line.text}" for line in new[j1:j2]]
    return Region((new[j1:j2] or old[i1:i2])[0].path, (*above, *edited, *below))


def _kept(known: Mapping[str, Line], line: Line) -> str:
    before = known.get(line.name)
    if before is None:
        return f"+ {line.text}"  # the next change begins within the context of this one
    return f"  {line.text}" if _whole(before) == _whole(line) else f"~ {line.text}"


@lru_cache(maxsize=1 << 16)
def _whole(line: Line) -> str:
    return f"{line.path}: {_PASSES.sub('', line.text)}"


@lru_cache(maxsize=1 << 16)
def _structure(line: Line) -> str:
    """The line without the names of the values that it reads."""
    head, equals, rest = _whole(line).partition(" = ")
    return head + equals + re.sub(r"%\w+", "%", rest) if equals else re.sub(r"%\w+", "%", head)


_PASSES = re.compile(r" <[\w, -]*>$")


def _header_diff(old: list[str], new: list[str]) -> str:
    """Changed header lines and weights, without context."""
    gone, come = set(old) - set(new), set(new) - set(old)
    changed = [f"- {line.strip()}" for line in old if line in gone] + [
        f"+ {line.strip()}" for line in new if line in come
    ]
    facts = [line for line in changed if not line[2:].startswith("@")]
    removed = [line for line in changed if line.startswith("- @")]
    added = [line for line in changed if line.startswith("+ @")]
    text = "".join(line + "\n" for line in facts)
    if removed or added:
        text += f"@@ weights: {len(removed)} before, {len(added)} after @@\n"
        text += "".join(line + "\n" for line in (*_first(removed), *_first(added)))
    return text


def _first(lines: list[str], count: int = 4) -> list[str]:
    rest = len(lines) - count
    return lines if rest <= 0 else [*lines[:count], f"  … and {rest} more"]


def _grouped(regions: list[Region]) -> list[list[Region]]:
    groups: dict[str, list[Region]] = {}
    for found in regions:
        groups.setdefault(found.shape, []).append(found)
    return list(groups.values())


def _shown(alike: list[Region]) -> str:
    first, *rest = alike
    text = f"@@ {first.path or 'top level'} @@\n" + "".join(line + "\n" for line in first.lines)
    if rest:
        text += f"  … and {len(rest)} more like this: {', '.join(dict.fromkeys(r.path for r in rest))}\n"
    return text
