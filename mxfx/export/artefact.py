"""A program in a folder: printed graph, safetensors, and a manifest that holds both to account. Nothing is pickled.

manifest.json          schema, version, size and hash of the other files, odd layouts of weights; written last
program.mxir           the printed program (``mxfx.graph.text``): graph, facts, annotations, hash of every weight
decode.mxir            of a program with phases: that of single steps; weights of its own are called decode/NAME
weights.safetensors    the weight store, one tensor a canonical name; above 4 GB weights-00001-of-0000N.safetensors …
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mxfx.graph.phases import PhaseError, joined
from mxfx.graph.program import Program
from mxfx.graph.text import TextError, parse, to_text
from mxfx.ground.errors import MxfxError
from mxfx.ground.files import DamagedFile, decoded, parse_json, remove_partial_files, write_file
from mxfx.ground.versions import version
from mxfx.ops import RUNTIME_FUNCTIONS

SCHEMA = 1
MANIFEST, PROGRAM, WEIGHTS = "manifest.json", "program.mxir", "weights.safetensors"
DECODE = "decode.mxir"
#: Before the name of a weight that decode has otherwise than the prefill, or alone.
_OWN = "decode/"

#: A file of weights is as large at most, unless a single tensor is larger.
SHARD_BYTES = 4 * 10**9

_CALL = re.compile(r"  %\w+ = ([\w.+-]+)")
_RUNTIME = frozenset(function.__name__ for function in RUNTIME_FUNCTIONS)
#: Namespaces of ops that only compute on tensors.
_NAMESPACES = ("aten", "mxfx", "mxfx_kernels")
_OPERATOR = frozenset(
    {"add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "pow", "getitem", "eq", "ne", "lt", "le", "gt", "ge"}
)
#: Operands that make an op reach outside the program.
_OUTSIDE_OPERANDS = frozenset({"filename", "path"})


#: What safetensors calls them.
_DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.int64: "I64",
    torch.float64: "F64",
}


class ArtefactError(MxfxError, ValueError):
    """A folder holds no artefact, or a damaged one; the message names the file, what is wrong and what to do."""


def save(program: Program, folder: Path | str, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write a program into ``folder`` (created; an artefact that is there is replaced).

    Weights of more than ``shard_bytes`` bytes are split over several files, in the store's order, no tensor cut.

    Every file is written whole or not at all, the manifest last, so a killed save leaves no folder that loads.

    Raises ``ArtefactError`` for weights without data or with NaN or Inf and for ops that ``load`` would refuse,
    ``WriteError`` for a full or failing disk.
    """
    folder = Path(folder)
    entries = {PROGRAM: program} if program.phases is None else {PROGRAM: program, DECODE: program.phases.decode}
    texts = {}
    for name, entry in entries.items():
        _check_weights(entry)
        printed = to_text(entry)
        check_ops(folder / name, printed)
        texts[name] = printed.encode()
    weights = _all_weights(program)
    folder.mkdir(parents=True, exist_ok=True)
    remove_partial_files(folder)
    (folder / MANIFEST).unlink(missing_ok=True)
    shards = _shards(weights, shard_bytes)
    sizes = {}
    for name, members in shards.items():
        # Piece by piece, so that memory holds one weight at a time.
        write_file(folder / name, safetensors_pieces({member: weights[member] for member in members}))
        sizes[name] = {"bytes": (folder / name).stat().st_size}
    for stale in _stored(folder) - set(shards):
        (folder / stale).unlink()
    if program.phases is None:
        (folder / DECODE).unlink(missing_ok=True)
    for name, text in texts.items():
        write_file(folder / name, text)
    manifest = {
        "schema": SCHEMA,
        "mxfx": version("mxfx"),
        "files": {**{name: {"bytes": len(text), "blake2b": _hash(text)} for name, text in texts.items()}, **sizes},
        "layouts": {name: axes for name, tensor in weights.items() if (axes := _layout(tensor)) is not None},
    }
    if program.phases is not None:
        manifest["phases"] = {"handoff": program.phases.handoff}
    write_file(folder / MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())


def load(folder: Path | str) -> Program:
    """The program that was saved in ``folder``: same graph, facts and annotations, bit-equal weights.

    Only ops of ATen and mxfx and the listed runtime functions are resolved; nothing in the files is executed.

    Raises ``ArtefactError`` for anything missing, truncated, changed or made by another version.
    """
    return Opened.of(folder).program()


@dataclass(frozen=True)
class Opened:
    """An artefact whose files are all there and have the sizes, its programs the hashes, that the manifest names.

    ``manifest`` and ``texts``, by file, are as read; ``weights`` are mapped, and not yet compared with their hashes.
    """

    folder: Path
    manifest: bytes
    texts: Mapping[str, str]
    weights: Mapping[str, Tensor]
    handoff: str | None

    @classmethod
    def of(cls, folder: Path | str) -> Opened:
        """Raises ``ArtefactError`` for a file that is missing, or not as the manifest says."""
        folder = Path(folder)
        if not folder.is_dir():
            raise ArtefactError(f"{folder} is no folder; give one that a run wrote its model to")
        read, manifest = _read_manifest(folder / MANIFEST)
        shards, texts = _check_files(folder, manifest)
        weights: dict[str, Tensor] = {}
        for name in shards:
            found = _read_weights(folder / name)
            if twice := sorted(found.keys() & weights):
                raise ArtefactError(f"{folder / name}: holds {twice[0]!r}, which another file of weights holds too")
            weights |= found
        _lay_out(weights, manifest.get("layouts", {}), folder / MANIFEST)
        handoff = None
        if (phases := manifest.get("phases")) is not None:
            if not isinstance(phases, dict) or "handoff" not in phases:
                raise ArtefactError(f"{folder / MANIFEST}: 'phases' must name the 'handoff'")
            handoff = str(phases["handoff"])
        return cls(folder, read, texts, weights, handoff)

    def program(self) -> Program:
        """All that the texts say, checked; packed weights stay mapped. Raises ``ArtefactError``."""
        # What is multiplied as it lies is cloned off the mapping, so that memory is aligned as everywhere else.
        weights = {n: t.clone() if t.is_floating_point() else t for n, t in self.weights.items()}
        program = _parsed(self.folder / PROGRAM, self.texts[PROGRAM], weights)
        known = set(program.weights)
        if self.handoff is not None:
            own = {name.removeprefix(_OWN): tensor for name, tensor in weights.items() if name.startswith(_OWN)}
            decode = _parsed(self.folder / DECODE, self.texts[DECODE], {**weights, **own})
            known |= {_OWN + name if name in own else name for name in decode.weights}
            try:
                program = joined(program, decode, self.handoff)
            except PhaseError as error:
                raise ArtefactError(f"{self.folder / MANIFEST}: 'phases': {error}") from error
        if strangers := sorted(set(weights) - known):
            raise ArtefactError(f"{self.folder}: its weights hold {strangers[0]!r}, which the program does not name")
        return program


def _parsed(path: Path, text: str, weights: Mapping[str, Tensor]) -> Program:
    check_ops(path, text)
    try:
        program = parse(text, weights)
    except TextError as error:
        raise ArtefactError(f"{path}: {error}") from error
    _check_weights(program)
    return program


def _all_weights(program: Program) -> Mapping[str, Tensor]:
    """The weights of all entries: those of the prefill, and what decode has otherwise or alone."""
    if program.phases is None:
        return program.weights
    found, decode = dict(program.weights), program.phases.decode.weights
    return found | {_OWN + name: tensor for name, tensor in decode.items() if found.get(name) is not tensor}


def _layout(tensor: Tensor) -> list[int] | None:
    """The axes of a tensor from the widest stride to the narrowest; None if they are in order, or overlap."""
    axes = sorted(range(tensor.dim()), key=lambda axis: -tensor.stride(axis))
    return axes if not tensor.is_contiguous() and tensor.permute(axes).is_contiguous() else None


def _lay_out(weights: dict[str, Tensor], layouts: object, path: Path) -> None:
    """Lay weights in memory as they lay when they were saved: the last bits of a product depend on it."""
    for name, axes in layouts.items() if isinstance(layouts, dict) else [("", layouts)]:
        tensor = weights.get(name)
        whole = isinstance(axes, list) and all(type(axis) is int for axis in axes)
        if tensor is None or not whole or sorted(axes) != list(range(tensor.dim())):
            raise ArtefactError(f"{path}: 'layouts' must name weights, and all axes of each; it has {name!r}: {axes!r}")
        inverse = sorted(range(len(axes)), key=axes.__getitem__)
        weights[name] = tensor.permute(axes).contiguous().permute(inverse)


def safetensors_pieces(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """A safetensors file of ``tensors``: header, then the bytes of one after the other, the widest elements first."""
    names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    header: dict[str, object] = {}
    end = 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.itemsize
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        yield memoryview(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _shards(weights: Mapping[str, Tensor], limit: int) -> dict[str, list[str]]:
    """The weights of each file, by its name: as many, in their order, as the limit holds."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, tensor in weights.items():
        if groups[-1] and size + tensor.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += tensor.nbytes
    return dict(zip(_shard_names(len(groups)), groups, strict=True))


def _shard_names(count: int) -> list[str]:
    stem, suffix = WEIGHTS.split(".")
    return [WEIGHTS] if count == 1 else [f"{stem}-{i:05d}-of-{count:05d}.{suffix}" for i in range(1, count + 1)]


def _stored(folder: Path) -> set[str]:
    """The files in a folder that are called as files of weights are."""
    return {path.name for pattern in (WEIGHTS, "weights-*-of-*.safetensors") for path in folder.glob(pattern)}


def _check_weights(program: Program) -> None:
    for name, tensor in program.weights.items():
        if tensor.device.type == "meta":
            raise ArtefactError(f"weight {name!r} has no data (meta device): there is nothing to keep")
        # Constants may hold -inf (masks).
        if name not in program.weights.constants and tensor.is_floating_point() and not tensor.isfinite().all():
            raise ArtefactError(
                f"weight {name!r} holds NaN or Inf: the model is broken, find the pass with `mxfx bisect`"
            )


def _read_manifest(path: Path) -> tuple[bytes, Mapping[str, object]]:
    if not path.is_file():
        raise ArtefactError(f"{path.parent} holds no {MANIFEST}: {_instead(path.parent)}")
    try:
        read = path.read_bytes()
        manifest = parse_json(read, path)
    except DamagedFile as error:
        raise ArtefactError(str(error)) from error
    if not isinstance(manifest, dict) or "schema" not in manifest:
        raise ArtefactError(f"{path}: is no manifest of an artefact: it has no 'schema'")
    if manifest["schema"] != SCHEMA:
        raise ArtefactError(
            f"{path}: schema {manifest['schema']!r}, written by mxfx {manifest.get('mxfx')}; this mxfx reads {SCHEMA}"
        )
    return read, manifest


def _instead(folder: Path) -> str:
    """What a folder without manifest is."""
    from mxfx.export.folder import is_folder

    if not (folder / "config.json").is_file() or is_folder(folder):
        return "no artefact, or one whose writing was cut short"
    return (
        f"it is a model that no run emitted; `mxfx run FILE --model {folder} --out OUT` makes an emitted one of it, "
        "with --eval … both are evaluated"
    )


def _check_files(folder: Path, manifest: Mapping[str, object]) -> tuple[list[str], dict[str, str]]:
    """The names of the files of weights, and the text of each program; every file is as the manifest says."""
    files = manifest.get("files")
    programs = [PROGRAM, DECODE] if "phases" in manifest else [PROGRAM]
    shards = _shard_names(max(len(files) - len(programs), 1)) if isinstance(files, dict) else []
    if not isinstance(files, dict) or set(files) != {*programs, *shards}:
        raise ArtefactError(
            f"{folder / MANIFEST}: 'files' must name {' and '.join(programs)} and {WEIGHTS}, or all of "
            f"{_shard_names(2)[0]} …"
        )
    for name, facts in files.items():
        path = folder / name
        if not isinstance(facts, dict) or type(facts.get("bytes")) is not int:
            raise ArtefactError(f"{folder / MANIFEST}: 'files' must give the bytes of {name}")
        if not path.is_file():
            raise ArtefactError(f"{path}: is missing")
        if path.stat().st_size != facts["bytes"]:
            raise ArtefactError(
                f"{path}: has {path.stat().st_size} bytes, the manifest says {facts['bytes']}: truncated or changed"
            )
    # The weights need no hash of the file: the program names the hash of each tensor.
    texts = {}
    for name in programs:
        data = (folder / name).read_bytes()
        if _hash(data) != files[name].get("blake2b"):
            raise ArtefactError(f"{folder / name}: does not have the hash that the manifest names: it was changed")
        try:
            texts[name] = decoded(data, folder / name)
        except DamagedFile as error:
            raise ArtefactError(str(error)) from error
    if extra := sorted(_stored(folder) - set(shards)):
        raise ArtefactError(f"{folder / extra[0]}: the manifest does not name it: remove it, or save the model again")
    return shards, texts


def check_ops(path: Path, text: str) -> None:
    """Let only ops through that compute on tensors: a name in a file must not become a call of anything else.

    Raises ``ArtefactError``.
    """
    known: set[str] = set()
    for number, line in enumerate(text.splitlines(), start=1):
        found = _CALL.match(line)
        if found is None or found[1] in known:
            continue
        known.add(found[1])
        if not _allowed(found[1]):
            raise ArtefactError(
                f"{path}: line {number}: {found[1]!r} is no op of a program; programs call "
                f"{', '.join(f'{module}.…' for module in _NAMESPACES)} and "
                f"{', '.join(sorted(_RUNTIME))}"
            )


def _allowed(target: str) -> bool:
    module, _, rest = target.partition(".")
    if target == "input":
        return True
    if module in ("runtime", "operator"):
        return rest in (_RUNTIME if module == "runtime" else _OPERATOR)
    name, _, overload = rest.partition(".")
    packet = getattr(getattr(torch.ops, module), name, None) if module in _NAMESPACES else None
    op = getattr(packet, overload or "default", None)
    return isinstance(op, torch._ops.OpOverload) and not _OUTSIDE_OPERANDS & {a.name for a in op._schema.arguments}


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        # In the file's mapping, which outlives a file that is replaced whole, as `save` does.
        return load_file(path)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        # safetensors calls a file that may not be read one that is not there.
        why = (
            "may not be read" if path.exists() and not os.access(path, os.R_OK) else f"is no safetensors file ({error})"
        )
        raise ArtefactError(f"{path}: {why}") from error


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=32).hexdigest()
