"""Results of a layer-by-layer pass, kept so that a killed run continues where it was.

    DIR/KEY/manifest.jsonl              header, then one line a layer: file, size, hash, what it follows
    DIR/KEY/layer-00000.safetensors     the layer's rewritten weights

The key is a hash of everything that decides the results (``mxfx.calibration.keys``), so another configuration has
another folder. Every file is written whole (``mxfx.ground.files``), the manifest's line last.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from mxfx.ground.errors import MxfxError
from mxfx.ground.files import parse_json, read_text, remove_partial_files, write_file

_MANIFEST = "manifest.jsonl"
_SCHEMA = 1
_LOCK_SECONDS = 10


class CheckpointError(MxfxError, RuntimeError):
    """The checkpoint folder cannot be used; the message says why."""


@dataclass(frozen=True)
class _Entry:
    """One line of the manifest. ``follows`` chains the hashes of the layers before."""

    layer: str
    file: str
    size: int
    blake2b: str
    follows: str
    results: list[dict[str, object]]


@contextmanager
def open_checkpoints(directory: Path, key: str, about: Mapping[str, object]) -> Iterator[LayerCheckpoints]:
    """The checkpoints of ``key`` under ``directory``, locked against other runs until the block ends.

    ``about`` is written to the manifest for people who look at it. Raises ``CheckpointError`` if another run holds the
    folder, ``OSError`` if it cannot be created.
    """
    folder = directory.expanduser() / key
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=_LOCK_SECONDS):
            remove_partial_files(folder)
            yield LayerCheckpoints(folder, key, about)
    except Timeout as error:
        raise CheckpointError(
            f"{folder} is in use by another run; wait for it or choose another checkpoint_dir"
        ) from error


class LayerCheckpoints:
    """Layers in order: ``load`` each, and ``save`` where ``load`` gave nothing.

    ``problems`` lists what was found damaged; such layers count as not there.
    """

    def __init__(self, folder: Path, key: str, about: Mapping[str, object]) -> None:
        self.problems: list[str] = []
        self._folder = folder
        self._header = {"schema": _SCHEMA, "key": key, "about": dict(about)}
        self._entries = self._read_manifest()
        self._chain = key

    def load(self, layer: str) -> tuple[dict[str, Tensor], list[dict[str, object]]] | None:
        """Weights and results of a layer; None if it is not there, damaged, or follows other layers than this run's."""
        entry = self._entries.get(layer)
        if entry is None:
            return None
        if entry.follows != self._chain:
            self._discard(layer, "it follows layers that were redone with another result")
            return None
        tensors = self._read_tensors(entry)
        if isinstance(tensors, str):
            self._discard(layer, tensors)
            return None
        self._chain = _next(self._chain, entry.blake2b)
        return tensors, entry.results

    def save(self, layer: str, tensors: Mapping[str, Tensor], results: list[dict[str, object]]) -> None:
        """Write a layer's weights, then its line. Raises ``WriteError`` with nothing half-written."""
        data = save({name: _compact(tensor) for name, tensor in tensors.items()})
        name = f"{layer}.safetensors"
        write_file(self._folder / name, data)
        self._entries[layer] = _Entry(layer, name, len(data), _hash(data), self._chain, results)
        self._chain = _next(self._chain, self._entries[layer].blake2b)
        lines = [self._header, *(asdict(entry) for entry in self._entries.values())]
        write_file(
            self._folder / _MANIFEST, "".join(json.dumps(line, sort_keys=True) + "\n" for line in lines).encode()
        )

    def _discard(self, layer: str, reason: str) -> None:
        self.problems.append(f"checkpoint of {layer} in {self._folder}: {reason}; the layer is done again")
        del self._entries[layer]

    def _read_manifest(self) -> dict[str, _Entry]:
        path = self._folder / _MANIFEST
        if not path.exists():
            return {}
        try:
            header, *lines = (parse_json(line, path) for line in read_text(path).splitlines())
            if not isinstance(header, dict) or (header.get("schema"), header.get("key")) != (
                _SCHEMA,
                self._header["key"],
            ):
                raise ValueError("its header belongs to another run or version")
            entries = [_Entry(**line) for line in lines]
            if any(entry.file != f"{entry.layer}.safetensors" or "/" in entry.layer for entry in entries):
                raise ValueError("it names a file of no layer")
            return {entry.layer: entry for entry in entries}
        except (OSError, ValueError, TypeError) as error:
            self.problems.append(f"{path} cannot be read ({error}); all layers are done again")
            return {}

    def _read_tensors(self, entry: _Entry) -> dict[str, Tensor] | str:
        """The weights of one file, or what is wrong with it."""
        try:
            data = (self._folder / entry.file).read_bytes()
        except OSError as error:
            return f"{entry.file} cannot be read ({error.strerror})"
        if len(data) != entry.size or _hash(data) != entry.blake2b:
            return f"{entry.file} is damaged: {len(data)} bytes, hash differs from the manifest's ({entry.size} bytes)"
        try:
            # Cloned, so that memory is aligned as in fresh results: the order of some sums depends on it.
            return {name: tensor.float().clone() for name, tensor in load(data).items()}
        except SafetensorError as error:
            return f"{entry.file} is no safetensors file ({error})"


def _compact(tensor: Tensor) -> Tensor:
    """The tensor in bfloat16 where that loses nothing (4-bit grids), else in float32."""
    tensor = tensor.detach().to("cpu", torch.float32)
    short = tensor.to(torch.bfloat16)
    return short if torch.equal(short.float(), tensor) else tensor.contiguous()


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=32).hexdigest()


def _next(chain: str, file_hash: str) -> str:
    return _hash(f"{chain}/{file_hash}".encode())
