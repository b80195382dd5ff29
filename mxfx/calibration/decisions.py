"""Decisions of a search, kept as readable JSON under a key: a file whose key does not fit is never used.

A file without a key is another tool's, and stays as it is. Of several processes the first reads and writes, and all
take what it found.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from mxfx.ground import ranks
from mxfx.ground.files import DamagedFile, read_json, write_json


def load_decisions(file: Path | None, key: str) -> tuple[dict[str, object] | None, str | None]:
    """The decisions that ``file`` holds for ``key``, or None and, where a file is there, why it is not used."""
    return ranks.from_first(partial(_load, file, key))


def _load(file: Path | None, key: str) -> tuple[dict[str, object] | None, str | None]:
    if file is None or not file.exists():
        return None, None
    known = _read(file)
    if known is None:
        return None, f"{file} is no file of mxfx: searching again, and the file stays as it is"
    if known["key"] == key:
        return known, None
    return None, f"{file} holds the decisions of another program, other tokens or options: searching again"


def _read(file: Path) -> dict[str, object] | None:
    try:
        known = read_json(file)
    except DamagedFile:
        return None
    return known if isinstance(known, dict) and "key" in known else None


def store_decisions(file: Path | None, key: str, found: dict[str, object]) -> None:
    """Write decisions so that a reader sees the old file or the new one, never half of one.

    None writes nothing; nor does a file that is not ours.
    """
    if file is None or not ranks.is_first() or (file.exists() and _read(file) is None):
        return
    write_json(file, {"key": key, **found})
