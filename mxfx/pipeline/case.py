"""A failed pass as a folder: the program before it, the passes from it on, the data that they saw."""

from __future__ import annotations

import platform
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from mxfx.config.pipeline import Pipeline
from mxfx.config.text import from_text
from mxfx.config.text import to_text as pipeline_text
from mxfx.graph.program import Program
from mxfx.graph.text import parse, to_text
from mxfx.ground.errors import MxfxError
from mxfx.ground.files import read_json, read_text, write_file, write_json, write_text

GRAPH, REFERENCE, WEIGHTS, PASSES, SAID = (
    "graph.txt",
    "reference.txt",
    "weights.safetensors",
    "passes.txt",
    "repro.json",
)


class CaseError(MxfxError, ValueError):
    """A folder is no reproducer, or a damaged one."""


@dataclass(frozen=True)
class Case:
    """What a failure needs to be seen again; ``reference`` is the float model that its run began with.

    ``ids`` are the probe's, ``tokens`` the calibration's (None: nobody asked), ``limit`` the match to stop after.
    ``error`` is the exception's kind: see ``kind_of``.
    """

    program: Program
    pipeline: Pipeline
    seed: int
    ids: Tensor | None
    tokens: Tensor | None
    limit: int | None
    reference: Program | None
    error: str = ""

    def save(self, folder: Path, error: Exception) -> None:
        """Write the folder; ``repro.json`` comes last, so that a folder with it is whole."""
        stored = _stored(self.program, "weight")
        whole = _is_whole(self.program)
        if self.reference is not None:
            write_text(folder / REFERENCE, to_text(self.reference))
            stored |= _stored(self.reference, "reference", besides=self.program)
        # The probe's ids may be a part of the calibration's: no two tensors of a file share memory.
        stored |= {n: t.cpu().clone() for n, t in (("probe", self.ids), ("tokens", self.tokens)) if t is not None}
        write_text(folder / GRAPH, to_text(self.program))
        write_file(folder / WEIGHTS, save(stored))
        write_text(folder / PASSES, pipeline_text(self.pipeline, settings=False) + "\n")
        said = {
            "seed": self.seed,
            "limit": self.limit,
            "weights": whole,
            "reference": self.reference is not None,
            "error": {
                "type": kind_of(error),
                "message": str(error),
                "traceback": traceback.format_exception(error),
            },
            "versions": _versions(),
        }
        write_json(folder / SAID, said, indent=1)

    @classmethod
    def read(cls, folder: Path) -> Case:
        """Raises ``CaseError`` for a folder that is none or damaged, ``TextError`` for a damaged graph."""
        if not (folder / SAID).is_file():
            raise CaseError(f"{folder} has no {SAID}; give the folder that a failed pass left: OUT/NAME/repro")
        try:
            said = read_json(folder / SAID)
            stored = load_file(folder / WEIGHTS)
            kind, seed, limit, whole = said["error"]["type"], said["seed"], said["limit"], said["weights"]
            has_reference = said["reference"]
        except (ValueError, KeyError, TypeError, OSError, SafetensorError) as error:
            raise CaseError(f"{folder} is damaged ({type(error).__name__}: {error}): run the pipeline again") from error
        weights = _named(stored, "weight")
        text = read_text(folder / PASSES).strip()
        program = parse(read_text(folder / GRAPH), weights if whole else None)
        reference = None
        if has_reference:
            own = {**weights, **_named(stored, "reference")} if whole else None
            reference = parse(read_text(folder / REFERENCE), own)
        pipeline = from_text(text, str(folder / PASSES))
        return cls(program, pipeline, seed, stored.get("probe"), stored.get("tokens"), limit, reference, kind)


def kind_of(error: BaseException) -> str:
    """The class of an exception, and what it was raised from: every pass that fails does so as a ``PassError``."""
    named, cause = type(error).__name__, error.__cause__
    return named if cause is None else f"{named} from {kind_of(cause)}"


def _is_whole(program: Program) -> bool:
    return all(tensor.device.type != "meta" for tensor in program.weights.values())


def _stored(program: Program, prefix: str, besides: Program | None = None) -> dict[str, Tensor]:
    """The weights that have data; those that ``besides`` holds under the same name are not stored twice."""
    known = {} if besides is None else dict(besides.weights.items())
    return {
        f"{prefix}/{name}": tensor.detach().cpu().contiguous().clone()
        for name, tensor in program.weights.items()
        if tensor.device.type != "meta" and known.get(name) is not tensor
    }


def _named(stored: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix + "/"): t for name, t in stored.items() if name.startswith(prefix + "/")}


def _versions() -> dict[str, str]:
    import transformers

    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
