"""A failure inside a pass leaves one folder with everything that is needed to see it again."""

from __future__ import annotations

import json
import platform
import traceback
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from mxfx.config.pipeline import Pipeline
from mxfx.config.text import to_text as pipeline_text
from mxfx.graph.program import Program
from mxfx.graph.text import to_text
from mxfx.pipeline.instruments.dump import write, write_bytes
from mxfx.pipeline.manager import Instrument, Run, Step


@dataclass
class Reproduce(Instrument):
    """Write ``folder/graph.txt``, ``weights.safetensors``, ``passes.txt``, ``repro.json`` when a pass fails.

    The graph is the one before the pass, the pipeline starts with it; calibration tokens are in it if a pass has asked
    for them (they may come from the network: nothing is fetched for a failure). ``mxfx repro folder`` runs it again.
    """

    folder: Path
    _tokens: Tensor | None = field(default=None, repr=False)

    def enter(self, run: Run) -> None:
        self._tokens = None

    def before(self, step: Step) -> None:
        given = step.ctx.tokens

        def asked() -> Tensor:
            self._tokens = given()
            return self._tokens

        step.ctx = replace(step.ctx, tokens=asked)

    def failed(self, step: Step, error: Exception) -> None:
        run = step.run
        remaining = Pipeline(run.passes[step.index - 1 :])
        save_reproducer(
            self.folder, step.before, remaining, error, run.ctx.seed, run.probe.ids, self._tokens, step.limit
        )
        error.add_note(f"reproducer: {self.folder} (run `mxfx repro {self.folder}`)")


def save_reproducer(
    folder: Path,
    program: Program,
    pipeline: Pipeline,
    error: Exception,
    seed: int,
    ids: Tensor | None,
    tokens: Tensor | None,
    limit: int | None,
) -> None:
    """Write one folder; ``repro.json`` comes last, so that a folder with it is whole."""
    real = {n: t for n, t in program.weights.items() if t.device.type != "meta"}
    stored = {f"weight/{n}": t.detach().cpu().contiguous().clone() for n, t in real.items()}
    stored |= {n: t.cpu().contiguous() for n, t in (("probe", ids), ("tokens", tokens)) if t is not None}
    write(folder / "graph.txt", to_text(program))
    write_bytes(folder / "weights.safetensors", save(stored))
    write(folder / "passes.txt", pipeline_text(pipeline, settings=False) + "\n")
    said = {
        "seed": seed,
        "limit": limit,
        "weights": len(real) == len(program.weights),
        "error": {"type": type(error).__name__, "message": str(error), "traceback": traceback.format_exception(error)},
        "versions": _versions(),
    }
    write(folder / "repro.json", json.dumps(said, indent=1) + "\n")


def _versions() -> dict[str, str]:
    import transformers

    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
