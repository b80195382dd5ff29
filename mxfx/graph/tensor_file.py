"""Tensors in one file, with facts about them and a digest: a flipped bit would be a number like any other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from mxfx.graph.weights import tensor_hash
from mxfx.ground.errors import reason_of
from mxfx.ground.files import DamagedFile, parse_json, write_file


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """Blake2b (32 hex digits) over the names and hashes of tensors, in the order of the names."""
    found = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        found.update(f"{name}={tensor_hash(tensors[name])}\n".encode())
    return found.hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: object = None) -> None:
    """Write a safetensors file, whole or not at all; ``about`` is JSON. Raises ``WriteError``."""
    plain = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    said = json.dumps(about)
    write_file(path, save(plain, {"about": said, "digest": _digest(said, plain)}))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], Any]:
    """What ``write_tensors`` wrote; tensors are in memory of their own, aligned as in a fresh process.

    Raises ``DamagedFile`` for any other file.
    """
    try:
        with safe_open(path, framework="pt") as opened:
            facts = opened.metadata() or {}
        about = parse_json(facts["about"], path)
        # The order of some sums depends on how memory is aligned.
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise DamagedFile(f"{path}: cannot be read ({type(error).__name__}: {reason_of(error)})") from error
    if facts.get("digest") != _digest(facts["about"], tensors):
        raise DamagedFile(f"{path}: does not have the digest that it was written with: it is damaged")
    return tensors, about


def _digest(about: str, tensors: Mapping[str, Tensor]) -> str:
    return hashlib.blake2b(f"{tensors_hash(tensors)} {about}".encode(), digest_size=16).hexdigest()
