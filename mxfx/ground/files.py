"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

from mxfx.ground.errors import MxfxError

_SUFFIX = ".part"


class WriteError(MxfxError, OSError):
    """A file could not be written; whatever stood under its name before still does."""


def write_file(path: Path, data: bytes) -> None:
    """Write ``data`` under a temporary name, flush it to the disk, rename it to ``path``, flush the folder.

    A process killed at any moment leaves the old file or the new one. Raises ``WriteError`` if the disk is full or
    fails; nothing of the attempt stays.
    """
    partial = path.with_name(path.name + _SUFFIX)
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _flush_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise WriteError(
            error.errno,
            f"could not write {len(data)} bytes: {error.strerror}; free space or choose another folder",
            str(path),
        ) from error


def cache_home() -> Path:
    """Where results are kept that several runs share: ``$MXFX_CACHE``, else ``mxfx`` in the user's cache folder."""
    given = os.environ.get("MXFX_CACHE")
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(given) if given else (Path(base) if base else Path.home() / ".cache") / "mxfx"


def write_text(path: Path, text: str) -> None:
    """``write_file`` of UTF-8 text; folders on the way are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, text.encode())


def write_json(path: Path, value: object, indent: int = 2) -> None:
    """``write_text`` of JSON as the standard has it: a number that is not finite is null."""
    text = json.dumps(finite(value), indent=indent, ensure_ascii=False, allow_nan=False, default=str)
    write_text(path, text + "\n")


def finite(value: object) -> object:
    """The value with None for every float in it that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def remove_partial_files(folder: Path) -> None:
    """Remove what a killed process left half-written."""
    for leftover in folder.glob("*" + _SUFFIX):
        leftover.unlink(missing_ok=True)


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
