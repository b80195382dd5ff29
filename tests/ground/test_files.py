"""Files are there whole or not at all, whoever else writes them."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from mxfx.ground import files
from mxfx.ground.files import write_file


def test_two_writers_of_one_file_do_not_mix_what_they_write(tmp_path: Path) -> None:
    """Both wrote under one temporary name: a file held parts of both, and who renamed it second found none."""
    path, both = tmp_path / "kept", threading.Barrier(2, timeout=30)

    def pieces(letter: bytes) -> Iterator[bytes]:
        for _ in range(4):
            both.wait()
            yield letter * 1000

    failed: list[Exception] = []

    def write(letter: bytes) -> None:
        try:
            write_file(path, pieces(letter), flush=False)
        except Exception as error:
            failed.append(error)
            both.abort()

    writers = [threading.Thread(target=write, args=(letter,)) for letter in (b"a", b"b")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert not failed
    assert path.read_bytes() in (b"a" * 4000, b"b" * 4000)
    assert os.listdir(tmp_path) == ["kept"]


def test_a_private_file_was_never_another_users_to_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def watched(path: Path, flags: int, mode: int = 0o777) -> int:
        handle = opened(path, flags, mode)
        seen.append(os.fstat(handle).st_mode & 0o777)
        return handle

    opened = os.open
    monkeypatch.setattr(files.os, "open", watched)
    write_file(tmp_path / "key", b"secret", private=True)
    assert seen[0] == 0o600 and (tmp_path / "key").stat().st_mode & 0o777 == 0o600
