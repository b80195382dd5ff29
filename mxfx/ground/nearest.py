"""The nearest valid name to one that is wrong."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(given: str, valid: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The valid name most like ``given``, None if none is; ``cutoff`` is 1 for equal names and 0 for any."""
    found = difflib.get_close_matches(given, list(valid), n=1, cutoff=cutoff)
    return found[0] if found else None


def did_you_mean(given: str, valid: Iterable[str]) -> str:
    """``did you mean 'x'?`` for the nearest valid name, or ``""`` if none is near."""
    near = nearest(given, valid)
    return f"did you mean {near!r}?" if near else ""
