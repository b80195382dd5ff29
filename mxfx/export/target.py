"""Targets of ``mxfx export``: one file a target, registered in it, each proved by reading back what it wrote."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

from safetensors import SafetensorError

from mxfx.export.bake import baked, left_out, transforms
from mxfx.export.errors import ExportError
from mxfx.export.plain import plain
from mxfx.export.unpack import unpacked
from mxfx.graph.program import Program
from mxfx.ground.errors import reason_of
from mxfx.ground.files import new_folder, why_not_new
from mxfx.ground.nearest import did_you_mean


@dataclass(frozen=True)
class Written:
    """What an export wrote and how it was proved.

    checks: name → figure (tensors compared, bytes, relative error of logits). notes: what a user should know.
    """

    folder: Path
    target: str
    checks: Mapping[str, object]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Target:
    """``refuse`` gives the reason why a program cannot be written, or None; ``write`` fills an empty folder and
    ``prove`` opens it with the other library, raising ``ExportError`` where codes or logits differ. All three take what
    ``of`` makes of the program: its state in the terms of the source model, or the program itself.
    """

    name: str
    meaning: str
    refuse: Callable[[Any], str | None]
    write: Callable[[Any, Path, Any], tuple[str, ...]]
    prove: Callable[[Any, Path], Mapping[str, object]]
    needs: tuple[str, ...] = ()
    of: Callable[[Program], Any] = plain


_TARGETS: dict[str, Target] = {}


def register(target: Target) -> Target:
    _TARGETS[target.name] = target
    return target


def targets() -> Mapping[str, Target]:
    """Every target by name: a file of this room that registers one is found by being there."""
    package = import_module("mxfx.export")
    for module in iter_modules(package.__path__, "mxfx.export."):
        import_module(module.name)
    return dict(_TARGETS)


def export(program: Program, folder: Path | str, to: str, *, bake: bool = False, tokenizer: Any = None) -> Written:
    """Write ``program`` for another library into ``folder``, which must not exist or be empty, and prove it.

    ``bake`` multiplies transforms at run time into weights, which then lie on no grid (bfloat16 only). The folder is
    there whole or not at all.

    Raises ``ExportError`` for an unknown target, what it cannot express, a folder that cannot be written, and a file
    that reads back otherwise.
    """
    target = _find(to)
    folder = Path(folder)
    if (why := why_not_new(folder)) is not None:
        raise ExportError(f"{folder} {why}; give a new folder")
    if program.phases is not None:
        raise ExportError(
            f"{to} cannot hold this model: it has a program for prefill and one for decode; "
            "export a model without phases"
        )
    plainly = unpacked(program) if bake else program
    given = target.of(baked(plainly) if bake else program)
    if bake and target.of is plain and transforms(plainly):
        given.config.mxfx_note = "transforms of the quantized model are baked into these weights: they lie on no grid"
    reason = target.refuse(given)
    if reason is not None:
        raise ExportError(f"{to} cannot hold this model: {reason}")
    try:
        with new_folder(folder) as partial:
            notes = target.write(given, partial, tokenizer)
            checks = target.prove(given, partial)
    except (OSError, SafetensorError) as error:
        # A library below says neither where nor what to do.
        raise ExportError(f"{folder} cannot be written: {reason_of(error)}; free space or give another") from error
    return Written(folder, to, checks, (*notes, *(left_out(plainly) if bake else ())))


def _find(name: str) -> Target:
    known = targets()
    if name not in known:
        raise ExportError(f"no export target {name!r}; {did_you_mean(name, known)} expected one of {', '.join(known)}")
    missing = [package for package in known[name].needs if not _installed(package)]
    if missing:
        raise ExportError(f"{name} needs the package {missing[0]}: pip install 'mxfx[export]'")
    return known[name]


def _installed(package: str) -> bool:
    from importlib.util import find_spec

    return find_spec(package) is not None
