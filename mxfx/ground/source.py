"""The code of mxfx itself, as part of the key of what is kept."""

from __future__ import annotations

import hashlib
import os
from functools import cache
from pathlib import Path


@cache
def source_digest() -> str:
    """Of every file of the package: while mxfx is worked on, a version does not tell what code made a thing."""
    root = str(Path(__file__).parents[1])
    digest = hashlib.blake2b(digest_size=16)
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if name != "__pycache__")
        for name in sorted(files):
            path = os.path.join(folder, name)
            with open(path, "rb") as file:
                data = file.read()
            digest.update(f"{os.path.relpath(path, root)} {len(data)}\n".encode())
            digest.update(data)
    return digest.hexdigest()
