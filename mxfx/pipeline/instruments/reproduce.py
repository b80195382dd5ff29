"""A failure inside a pass leaves one folder with everything that is needed to see it again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from mxfx.config.pipeline import Pipeline
from mxfx.pipeline.case import Case
from mxfx.pipeline.instruments.ledger import BudgetError
from mxfx.pipeline.manager import Instrument, Run, Step


@dataclass
class Reproduce(Instrument):
    """Write a ``Case`` into ``folder`` when a pass fails; ``mxfx repro folder`` runs it again.

    The graph is the one before the pass, the pipeline starts with it; calibration tokens are in it if a pass has asked
    for them (they may come from the network: nothing is fetched for a failure). A budget that is exceeded is no failure
    of the pass: run again it would go through, and ``mxfx bisect`` finds where the loss is.
    """

    folder: Path
    _tokens: Tensor | None = field(default=None, repr=False)

    def enter(self, run: Run) -> None:
        self._tokens = None

    def before(self, step: Step) -> None:
        step.ctx = replace(step.ctx, tokens=self._kept(step.ctx.tokens), read=self._kept(step.ctx.read))

    def _kept(self, given: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def asked(*wanted: Any) -> Tensor:
            self._tokens = given(*wanted)
            return self._tokens

        return asked

    def failed(self, step: Step, error: Exception) -> None:
        if isinstance(error, BudgetError):
            return
        run = step.run
        remaining = Pipeline(run.passes[step.index - 1 :])
        case = Case(step.before, remaining, run.ctx.seed, run.probe.ids, self._tokens, step.limit, run.ctx.reference)
        case.save(self.folder, error)
        error.add_note(f"reproducer: {self.folder} (run `mxfx repro {self.folder}`)")
