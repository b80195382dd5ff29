"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mxfx.ground.errors import MxfxError, reason_of

_SUFFIX = ".part"


class WriteError(MxfxError, OSError):
    """A file could not be written; whatever stood under its name before still does."""


class DamagedFile(MxfxError, ValueError):
    """A file does not hold what it should; the message begins with its path."""


def read_text(path: Path) -> str:
    """The UTF-8 text of a file. Raises ``DamagedFile``, and ``OSError`` for one that cannot be opened."""
    return decoded(path.read_bytes(), path)


def decoded(data: bytes, where: object) -> str:
    """The UTF-8 text that was read at ``where``. Raises ``DamagedFile``."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DamagedFile(f"{where}: is not UTF-8 (byte {error.start})") from error


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises what ``parse_json`` raises, and ``OSError`` for one that cannot be opened."""
    return parse_json(path.read_bytes(), path)


def parse_json(text: str | bytes, where: object) -> Any:
    """The value of a JSON text that stands at ``where``.

    Raises ``DamagedFile`` for one that is none, that nests deeper or has longer numbers than Python reads.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamagedFile(f"{where}: is not JSON ({reason_of(error)})") from error


def write_file(
    path: Path, data: bytes | Iterable[bytes | memoryview], *, flush: bool = True, private: bool = False
) -> None:
    """Write ``data``, whole or in pieces, under a temporary name, flush it, rename it to ``path``, flush the folder.

    A process killed at any moment leaves the old file or the new one; so does a machine, but without ``flush``, which
    is for what a run writes many of and nobody reads back. Each of several writers at once has a temporary name of its
    own, and the last one's file stays. Raises ``WriteError`` if the disk is full or fails: nothing of the attempt
    stays.
    """
    size = 0
    try:
        with unfinished(path.with_name(f"{path.name}.{os.urandom(4).hex()}{_SUFFIX}")) as partial:
            # Private from its first moment: who opened it before it became so could read what is written later.
            os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600 if private else 0o666))
            with open(partial, "wb") as file:
                for piece in [data] if isinstance(data, bytes) else data:
                    size += len(piece)
                    file.write(piece)
                file.flush()
                if flush:
                    os.fsync(file.fileno())
            os.replace(partial, path)
        if flush:
            _flush_folder(path.parent)
    except OSError as error:
        raise WriteError(
            error.errno,
            f"could not write {size} bytes: {error.strerror}; free space or choose another folder",
            str(path),
        ) from error


#: What is being made and may not stay as it is.
_unfinished: set[Path] = set()


@contextlib.contextmanager
def unfinished(path: Path) -> Iterator[Path]:
    """A file or folder that is gone in the end, by whatever that comes: until then it is renamed, or of no use."""
    _unfinished.add(path)
    try:
        yield path
    finally:
        _remove(path)
        _unfinished.discard(path)


def why_not_new(folder: Path) -> str | None:
    """Why ``new_folder`` would not make a folder; None if it would."""
    if not folder.name:
        return "is no name that a new folder could have"
    there = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    return "exists already and is not empty" if there else None


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write in, which becomes ``folder`` once it is left: that one is there whole or not at all.

    ``folder`` must not exist or be empty (``why_not_new``). Raises ``OSError``.
    """
    with unfinished(folder.with_name(f"{folder.name}.{os.getpid()}{_SUFFIX}")) as partial:
        partial.mkdir(parents=True)
        yield partial
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)


def temporary_folder(prefix: str, within: Path | None = None) -> tempfile.TemporaryDirectory:
    """A folder that goes with the object, and with the process however it is ended (but by SIGKILL)."""
    made = tempfile.TemporaryDirectory(prefix=prefix, dir=within)
    _unfinished.add(Path(made.name))
    return made


def remove_unfinished() -> None:
    """Remove what is being made: the process is about to end."""
    for path in tuple(_unfinished):
        _remove(path)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def cache_home() -> Path:
    """Where results are kept that several runs share: ``$MXFX_CACHE``, else ``mxfx`` in the user's cache folder."""
    given = os.environ.get("MXFX_CACHE")
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(given) if given else (Path(base) if base else Path.home() / ".cache") / "mxfx"


def keep(path: Path, data: bytes, *, private: bool = False) -> bool:
    """Write what spares later processes work; whether it was written. That it was not is a warning, once a folder."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, data, private=private)
    except OSError as error:
        say_not_kept(path.parent, reason_of(error))
        return False
    return True


def say_not_kept(
    folder: Path, why: str, instead: str = "what is kept there is measured and made again by every process"
) -> None:
    """Warn that nothing can be kept in a folder, and what is done ``instead``: once a process, of a folder of the cache
    for all of it.
    """
    home = cache_home()
    shared = folder.is_relative_to(home)
    place = home if shared else folder
    if (place, instead) not in _said:
        _said.add((place, instead))
        remedy = "set MXFX_CACHE to a folder that can" if shared else "make room there, or let it be written to"
        warnings.warn(f"{place} cannot be written to ({why}): {instead}; {remedy}", stacklevel=4)


#: Places of which ``say_not_kept`` has warned, and what was done instead.
_said: set[tuple[Path, str]] = set()


def write_text(path: Path, text: str, *, flush: bool = True) -> None:
    """``write_file`` of UTF-8 text; folders on the way are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, text.encode(), flush=flush)


def write_json(path: Path, value: object, indent: int = 2, *, flush: bool = True) -> None:
    """``write_text`` of JSON as the standard has it: a number that is not finite is null."""
    text = json.dumps(finite(value), indent=indent, ensure_ascii=False, allow_nan=False, default=str)
    write_text(path, text + "\n", flush=flush)


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
        _remove(leftover)


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
