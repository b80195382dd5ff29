"""What the emit stage made of a folder, beside it and in the user's cache, for the processes that open it.

To read a program with all checks and to emit it takes longer than to build it and to run it once, and the result
depends on the folder, the code of mxfx and torch, and the kernels for the device alone. It is written twice:

FOLDER/emitted-DEVICE.mxir   by who saves the folder, for the CPU, and for CUDA where that process uses it
CACHE/emitted/KEY.mxir       by who opens it where that one does not fit: it was made by other code, for other kernels

    // the hash of what follows, under a key that this user alone has (CACHE/key)
    // {"folder": hash of its manifest, "mxfx": …, "torch": …, "kernels": …,
        "decoded": packed weights that run as floats, which the opening decodes, each with its format}
    the lowered program, printed

and beside it `.safetensors`, where the stage made other weights that the folder has not (a transform's matrix).

The folder's own files are read and held to its manifest every time, its weights to their hashes, and so is what the
opening decodes. Only the text is not proven again: when it was written, it was read back and compared. So one that
somebody else wrote, who might have a kernel read what is not its own, is never used, nor one that is damaged, or was
made of or for anything else; a warning says why when the stage therefore runs. A folder from elsewhere costs it once.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import importlib.metadata
import json
import os
import secrets
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, fx

from mxfx.export.artefact import Opened, check_ops
from mxfx.formats import parse as parse_format
from mxfx.formats.stored import codes_length, restore, scales_length
from mxfx.graph.execute import runtime_weight
from mxfx.graph.node import operands
from mxfx.graph.program import Program
from mxfx.graph.text import to_text
from mxfx.graph.text.stated import parse_stated
from mxfx.graph.weights import tensor_hash
from mxfx.ground.errors import MxfxError, reason_of
from mxfx.ground.files import cache_home, keep, parse_json, read_text, write_file
from mxfx.ground.source import source_digest
from mxfx.ground.versions import version
from mxfx.ops.kernels.library import load_cpu
from mxfx.ops.plugins import ENTRY_POINT_GROUP
from mxfx.ops.providers import offered
from mxfx.pipeline.emit import emitted

#: Bytes of weights that the stage may have made, and nobody can decode: beyond, an emission is not kept.
_MOST = 256 << 20
#: The same in a model's folder, which holds no weight twice.
_SMALL = 1 << 20
#: Bytes of a folder's weights beyond which nothing is emitted when it is saved: it would take memory for the decoded
#: ones, and who opens it waits for its weights.
_LARGEST = 1 << 30
#: Bytes of all that is kept in the cache, that which was read last.
_ROOM = 2 << 30
_NAME = "emitted-{}.mxir"
_KEY_BYTES = 32
#: What a program was made of and for, by the key of its header, in words.
_DIFFERS = {
    "folder": "of another program",
    "mxfx": "by another mxfx",
    "torch": "with another torch",
    "plugins": "with other plugins of mxfx",
    "kernels": "for other kernels",
    "device": "for another device",
}


class _NotOurs(MxfxError):
    """A text whose hash this user did not make."""


@dataclass(frozen=True)
class _Written:
    """A text and the two lines above it."""

    facts: Mapping[str, Any]
    text: str

    @classmethod
    def at(cls, path: Path) -> _Written | None:
        """None for a file that is not there. Raises ``_NotOurs``, and ``ValueError`` for one that is damaged."""
        if not path.is_file():
            return None
        seal, _, rest = read_text(path).partition("\n")
        if not hmac.compare_digest(seal, _sealed(rest)):
            raise _NotOurs("this user did not write it so: it came from elsewhere, or is damaged")
        facts, _, text = rest.partition("\n")
        return cls(parse_json(facts.removeprefix("// "), path), text)

    def __bytes__(self) -> bytes:
        rest = f"// {json.dumps(self.facts)}\n{self.text}"
        return f"{_sealed(rest)}\n{rest}".encode()


def emission(opened: Opened, device: torch.device) -> Program:
    """The lowered program of a folder for a device, to be built: as it was written beside it or kept, else emitted, and
    kept.

    Emitted every time: a program with phases, one for other devices than CPUs and CUDA, and one for which the stage
    makes more than ``_MOST`` bytes of weights. Raises what ``Opened.program`` and the emit stage raise.
    """
    if opened.handoff is not None or device.type not in ("cpu", "cuda"):
        return emitted(opened.program(), device)
    facts = _facts(opened, device)
    shipped = opened.folder / _NAME.format(device.type)
    found, problem = _read(shipped, facts, opened)
    if found is not None:
        return found
    path = cache_home() / "emitted" / f"{_key(facts)}.mxir"
    found, _ = _read(path, facts, opened)
    if found is not None:
        with contextlib.suppress(OSError):
            os.utime(path)
        return found
    if problem:
        warnings.warn(f"{shipped} is not used, {problem}: the program is emitted again", stacklevel=3)
    program = opened.program()
    made = emitted(program, device)
    files = _printed(path, facts, program, made, _MOST)
    if files and all(keep(file, data) for file, data in files.items()):
        _forget(path.parent)
    return made


def write_beside(folder: Path, program: Program) -> None:
    """Write what the emit stage makes of a program into the folder that it was saved in.

    Nothing for a program with phases and for weights of more than ``_LARGEST`` bytes. That it cannot be emitted or
    written is a warning: the folder is whole without.
    """
    for stale in folder.glob(_NAME.format("*")):
        stale.with_suffix(".safetensors").unlink(missing_ok=True)
        stale.unlink()
    if program.phases is not None or sum(tensor.nbytes for tensor in program.weights.values()) > _LARGEST:
        return
    opened = Opened.of(folder)
    if any(tensor.is_cuda for tensor in program.weights.values()):
        # What is computed of weights is computed where an opening would.
        program = opened.program()
    # Of CUDA in a process that has no other use for it, the context alone would take seconds.
    for kind in ("cpu", "cuda") if torch.cuda.is_initialized() else ("cpu",):
        path, device = folder / _NAME.format(kind), torch.device(kind)
        try:
            files = _printed(path, _facts(opened, device), program, emitted(program, device), _SMALL)
            for file, data in files.items():
                write_file(file, data)
        except (MxfxError, OSError) as error:
            warnings.warn(f"{folder} has no program for {kind} that opens at once: {reason_of(error)}", stacklevel=3)


def _facts(opened: Opened, device: torch.device) -> dict[str, Any]:
    """All that decides what the stage makes. The manifest names the hash of the program, that its weights'.

    Of several kernels the first that takes a node's operands is chosen: those of a CPU by the operands alone, those of
    CUDA by facts of the device too.
    """
    kind: list[object] = [device.type]
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        kind += [found.name, found.major, found.minor, found.multi_processor_count]
    groups = [importlib.metadata.entry_points(group=group) for group in (ENTRY_POINT_GROUP, "mxfx.passes")]
    return {
        "folder": hashlib.blake2b(opened.manifest, digest_size=16).hexdigest(),
        "mxfx": f"{version('mxfx')} {source_digest()}",
        # Builds of one version for several devices have the same ops.
        "torch": torch.__version__.partition("+")[0],
        "plugins": [f"{e.value} {e.dist.version if e.dist is not None else ''}" for group in groups for e in group],
        "kernels": list(offered(device)),
        "device": kind,
    }


def _key(facts: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()


def _read(path: Path, facts: Mapping[str, Any], opened: Opened) -> tuple[Program | None, str]:
    """The program of a file; without one, what is wrong with the file, nothing where none is there."""
    try:
        written = _Written.at(path)
        if written is None:
            return None, ""
        for key, there in facts.items():
            if written.facts.get(key) != there:
                words = f"it was made {_DIFFERS[key]}"
                return None, f"{words} ({written.facts.get(key)}, here {there})" if key == "torch" else words
        check_ops(path, written.text)
        beside = path.with_suffix(".safetensors")
        made = load_file(beside) if beside.is_file() else {}
        decoded = {name: _decode(name, how, opened.weights) for name, how in written.facts["decoded"].items()}
        return parse_stated(written.text, {**opened.weights, **made, **decoded}), ""
    except _NotOurs as error:
        return None, str(error)
    except Exception as error:
        # What it says to decode may be refused by torch with any kind of error.
        return None, f"it is damaged ({reason_of(error)})"


def _decode(name: str, how: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Tensor:
    """A packed weight as floats, ``(…, width)``. Raises ``ValueError`` for codes and scales of another width."""
    codes, scales = (weights[f"{name}.{part}"] for part in ("codes", "scales"))
    fmt, width, dtype = parse_format(how["format"]), how["width"], getattr(torch, how["dtype"])
    rows = codes.shape[:-1]
    fit = (codes.shape, scales.shape) == ((*rows, codes_length(width, fmt)), (*rows, scales_length(width, fmt)))
    if not fit or {codes.dtype, scales.dtype} != {torch.uint8}:
        raise ValueError(f"its {name!r} has no rows of {width} in {fmt}")
    if codes.is_cuda or load_cpu() is not None:
        return restore(codes, scales, fmt, width, dtype)
    from mxfx.ops.kernels.cpu import restored

    return restored(codes.contiguous(), scales.contiguous(), how["format"], width, dtype)


def _sealed(text: str) -> str:
    return f"// {hashlib.blake2b(text.encode(), digest_size=32, key=_key_of_user()).hexdigest()}"


def _key_of_user() -> bytes:
    """Drawn once, and kept where only this user reads it; for this process alone where nothing can be kept."""
    path = cache_home() / "key"
    for _ in range(2):
        with contextlib.suppress(OSError):
            if len(found := path.read_bytes()) == _KEY_BYTES:
                return found
        # Of two processes that draw one, both read that of the later.
        if not keep(path, secrets.token_bytes(_KEY_BYTES), private=True):
            break
    return _own_key()


@cache
def _own_key() -> bytes:
    return secrets.token_bytes(_KEY_BYTES)


def _printed(path: Path, facts: Mapping[str, Any], source: Program, program: Program, most: int) -> dict[Path, bytes]:
    """The files of an emission; none where it cannot be read back, or holds too many weights that were made."""
    read = dict(source.weights.items())
    made = {n: runtime_weight(program, n) for n, tensor in program.weights.items() if tensor is not read.get(n)}
    decoded = _decoded(source, made)
    own = {name: tensor for name, tensor in made.items() if name not in decoded}
    if sum(tensor.nbytes for tensor in own.values()) > most:
        return {}
    for name, tensor in made.items():
        # As it runs: half the bytes of the precision that passes compute in.
        program.weights.share(name, tensor)
    text = to_text(program)
    try:
        again = parse_stated(text, program.weights)
    except MxfxError:
        return {}
    if _calls(again.graph) != _calls(program.graph):
        return {}
    tensors: dict[str, Tensor] = {name: tensor.cpu().contiguous() for name, tensor in own.items()}
    weights = {path.with_suffix(".safetensors"): save(tensors)} if tensors else {}
    return {**weights, path: bytes(_Written({**facts, "decoded": decoded}, text))}


def _decoded(source: Program, made: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Of the weights that were made, those that ``_decode`` makes again bit for bit, and how."""
    from mxfx.passes.unpack_weights import packed_nodes

    found = {}
    for given in map(operands, packed_nodes(source.graph)):
        name = source.weights.canonical(str(given["codes"].target)).removesuffix(".codes")
        if name in made and name not in found:
            dtype = str(made[name].dtype).removeprefix("torch.")
            how = {"format": str(given["format"]), "width": made[name].shape[-1], "dtype": dtype}
            if tensor_hash(_decode(name, how, source.weights)) == tensor_hash(made[name]):
                found[name] = how
    return found


def _calls(graph: fx.Graph) -> list[tuple[object, ...]]:
    """All that is built of a graph."""
    called = (n for n in graph.nodes if n.op != "get_attr")
    return [(n.op, n.name, n.target, repr(fx.map_arg((n.args, n.kwargs), _named))) for n in called]


def _named(node: fx.Node) -> str:
    """A weight by its name in the store, as printed: that of the node that reads it is free."""
    return f"@{node.target}" if node.op == "get_attr" else f"%{node.name}"


def _forget(folder: Path) -> None:
    """Remove what nobody has read for the longest time, where all together have no room."""
    with contextlib.suppress(OSError):
        left = _ROOM
        for text in sorted(folder.glob("*.mxir"), key=lambda one: one.stat().st_mtime, reverse=True):
            beside = text.with_suffix(".safetensors")
            left -= sum(one.stat().st_size for one in (text, beside) if one.is_file())
            if left < 0:
                text.unlink(missing_ok=True)
                beside.unlink(missing_ok=True)
