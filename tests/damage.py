"""Damage of files: bytes anywhere, and values of JSON that are as well formed as before."""

from __future__ import annotations

import json
import random
from typing import Any

#: What no field of a file of ours expects, or a size that no machine has.
ODD = (
    None, True, -1, 0, 3, 1 << 70, 1.5, float("nan"), "", "../../evil", "/etc/hostname", "\ud800", [], [[]], {},
    {"a": 1}, [None], "x" * 5000,
)  # fmt: skip


def damaged(data: bytes, draw: random.Random) -> bytes:
    """Bits flipped, a cut, a run of bytes doubled, zeroed or set: sizes and offsets in headers are hit as well."""
    start = draw.randrange(len(data))
    end = min(len(data), start + draw.choice((1, 4, 8, 64)))
    piece = data[start:end]
    filled = draw.choice(
        (
            bytes([piece[0] ^ 1 << draw.randrange(8)]) + piece[1:],
            piece * 2,
            bytes(len(piece)),
            b"\xff" * len(piece),
            b"",
        )
    )
    return draw.choice((data[:start], data[:start] + filled + data[end:], data[:start] + filled + data[end:]))


def damaged_json(data: bytes, draw: random.Random) -> bytes:
    """One value replaced by an odd one, one key taken away or called otherwise; seldom nesting without end."""
    if draw.random() < 0.05:
        return b"[" * 100_000
    value = json.loads(data)
    places = list(_places(value))
    holder, key = draw.choice(places)
    what = draw.random()
    if isinstance(holder, dict) and what < 0.25:
        del holder[key]
    elif isinstance(holder, dict) and what < 0.35:
        holder[f"{key}x"] = holder.pop(key)
    else:
        holder[key] = draw.choice(ODD)
    return json.dumps(value).encode()


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every place inside a JSON value: its holder and the key or index there."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [place for key in keys for place in ((value, key), *_places(value[key]))]
