"""What a pass may use beside the program: calibration tokens, a seed, a device, a cache folder, progress."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from mxfx.graph.program import Program
from mxfx.ground.errors import CheckError, MxfxError

_T = TypeVar("_T")


class MissingCalibration(MxfxError, ValueError):
    """A pass needs calibration data and the run has none."""


class StrictError(CheckError, RuntimeError):
    """A pass fell back to something worse than asked, and the run is strict."""


def _no_tokens() -> Tensor:
    raise MissingCalibration(
        "this pass needs calibration data and the run has none: "
        "add a [calibration] table to the pipeline or give --data FILE; to mxfx.compile, tokens"
    )


def _no_reader(dataset: str, samples: int, length: int) -> Tensor:
    raise MissingCalibration(f"this pass reads {dataset!r} and the run has no tokenizer: run it over a model's folder")


def _nowhere(option: tuple) -> str | None:
    return None


def _silent(items: Iterable[_T], description: str, total: int | None = None) -> Iterator[_T]:
    return iter(items)


@dataclass
class Context:
    """Everything around one run of a pipeline.

    ``tokens`` gives calibration ids, int64 ``(samples, length)``, and raises ``MissingCalibration`` if there are none;
    ``read(dataset, samples, length)`` gives those of another data set. ``cache`` is the folder for results that later
    runs reuse (None: nothing is kept). ``progress`` wraps an iterable of long steps and shows a bar. ``strict`` turns
    every fallback that a pass would warn of into an error (``StrictError``), so that the run ends with a non-zero exit
    code. ``reference`` is the program before the first pass, the float model that later passes may compare with.
    ``where`` gives the place of an option in the pipeline file, as ``FILE:LINE``, for records of who decided what; None
    where nobody knows. Of a pipeline with phases, ``phase`` is the one that the pass runs for, ``peer`` the program of
    the other as far as that is, and ``handoff`` what ``mxfx.graph.program.Phases`` says of it.
    """

    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    tokens: Callable[[], Tensor] = _no_tokens
    read: Callable[[str, int, int], Tensor] = _no_reader
    cache: Path | None = None
    strict: bool = False
    progress: Callable[..., Iterator] = _silent
    reference: Program | None = None
    where: Callable[[tuple], str | None] = _nowhere
    phase: str = ""
    peer: Program | None = None
    handoff: str = ""

    def generator(self, purpose: str) -> torch.Generator:
        """A CPU generator seeded by the run's seed and the purpose, so that passes do not disturb each other."""
        import hashlib

        digest = hashlib.blake2b(f"{self.seed}/{purpose}".encode(), digest_size=7).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "big"))
