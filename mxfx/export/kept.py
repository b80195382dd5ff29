"""What the emit stage made of a folder, kept for the processes that open it next.

To emit a program takes longer than to build it and to run it once, and the result depends on the folder, the device
with its kernels, and the code of mxfx alone. Under the hash of these it lies in the user's cache:

emitted/KEY.mxir          the hash of what follows, then the lowered program, printed
emitted/KEY.safetensors   weights that the stage made and the folder has not (folded constants), if there are any

The folder's own files are read and held to its manifest every time, its weights to their hashes: a changed file has
another key, or is an error. Only the text is not proven again: when it was kept, it was read back and compared.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, fx

from mxfx.export.artefact import Opened, check_ops
from mxfx.graph.execute import runtime_weight
from mxfx.graph.program import Program
from mxfx.graph.text import to_text
from mxfx.graph.text.stated import parse_stated
from mxfx.ground.errors import MxfxError
from mxfx.ground.files import cache_home, keep, read_text
from mxfx.ground.source import source_digest
from mxfx.ops.kernels.build import library
from mxfx.ops.plugins import ENTRY_POINT_GROUP
from mxfx.ops.providers import offered
from mxfx.pipeline.emit import emitted

#: Bytes of weights that the stage may have made: beyond, an emission is not kept.
_MOST = 256 << 20
#: Bytes of all that is kept, that which was read last.
_ROOM = 2 << 30


def emission(opened: Opened, device: torch.device) -> Program:
    """The lowered program of a folder for a device, to be built: as it was kept, else emitted, and kept.

    Emitted every time: a program with phases, one for other devices than CPUs and CUDA, and one for which the stage
    makes more than ``_MOST`` bytes of weights (a packed head of 8 bits, which no kernel of a CPU multiplies). Raises
    what ``Opened.program`` and the emit stage raise.
    """
    path = _path(opened, device) if opened.handoff is None and device.type in ("cpu", "cuda") else None
    found = None if path is None else _read(path, opened)
    if found is not None:
        return found
    program = opened.program()
    made = emitted(program, device)
    if path is not None:
        _keep(path, program, made)
    return made


def _path(opened: Opened, device: torch.device) -> Path:
    """Named after all that decides what the stage makes. The manifest names the hash of the program, that its weights'.

    Of several kernels the first that takes a node's operands is chosen, by facts of the device and its libraries.
    """
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        kind: tuple[object, ...] = (facts.name, facts.major, facts.minor, facts.multi_processor_count)
    else:
        kind = (torch.backends.cpu.get_cpu_capability(), getattr(library(), "_name", ""))
    groups = [importlib.metadata.entry_points(group=group) for group in (ENTRY_POINT_GROUP, "mxfx.passes")]
    others = [(e.value, e.dist.version if e.dist is not None else "") for group in groups for e in group]
    about = (source_digest(), torch.__version__, device.type, kind, others, offered(device))
    key = hashlib.blake2b(opened.manifest + repr(about).encode(), digest_size=16).hexdigest()
    return cache_home() / "emitted" / f"{key}.mxir"


def _read(path: Path, opened: Opened) -> Program | None:
    """None for one that is not there, and for one that is damaged: it is made and kept again."""
    try:
        first, _, text = read_text(path).partition("\n")
        if first != _sealed(text):
            return None
        beside = path.with_suffix(".safetensors")
        made = load_file(beside) if beside.is_file() else {}
        check_ops(path, text)
        program = parse_stated(text, {**opened.weights, **made})
    except (MxfxError, OSError, SafetensorError):
        return None
    with contextlib.suppress(OSError):
        os.utime(path)
    return program


def _sealed(text: str) -> str:
    return f"// {hashlib.blake2b(text.encode(), digest_size=32).hexdigest()}"


def _keep(path: Path, source: Program, program: Program) -> None:
    read = dict(source.weights.items())
    made = {n: runtime_weight(program, n) for n, tensor in program.weights.items() if tensor is not read.get(n)}
    if sum(tensor.nbytes for tensor in made.values()) > _MOST:
        return
    for name, tensor in made.items():
        # As it runs: half the bytes of the precision that passes compute in.
        program.weights.share(name, tensor)
    text = to_text(program)
    try:
        again = parse_stated(text, program.weights)
    except MxfxError:
        return
    if _calls(again.graph) != _calls(program.graph):
        return
    if made:
        tensors: dict[str, Tensor] = {name: tensor.cpu().contiguous() for name, tensor in made.items()}
        if not keep(path.with_suffix(".safetensors"), save(tensors)):
            return
    if keep(path, f"{_sealed(text)}\n{text}".encode()):
        _forget(path.parent)


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
