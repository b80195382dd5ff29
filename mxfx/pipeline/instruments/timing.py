"""How long each pass takes, and what the instruments cost beside it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from mxfx.pipeline.manager import PASSES, Instrument, Run, Step


@dataclass
class Timing(Instrument):
    """Wall seconds of every pass, in ``findings["timing"]``. Stands last, so that it times the pass and
    nothing else.
    """

    passes: list[tuple[str, float]] = field(default_factory=list)
    instruments: dict[str, float] = field(default_factory=dict)
    total: float = 0.0
    _entered: float = 0.0
    _started: float = 0.0

    def enter(self, run: Run) -> None:
        self.passes.clear()
        self._entered = time.perf_counter()

    def before(self, step: Step) -> None:
        self._started = time.perf_counter()

    def after(self, step: Step) -> None:
        seconds = time.perf_counter() - self._started
        self.passes.append((f"{step.index} {step.pass_.name}", seconds))
        step.findings["timing"] = {"seconds": seconds}

    def exit(self, run: Run) -> None:
        self.total = time.perf_counter() - self._entered
        others = run.clock.parts.keys() - {PASSES, type(self).__name__}
        self.instruments = {name: run.clock.parts[name].seconds for name in sorted(others)}

    def table(self) -> str:
        """One line a pass and one an instrument: seconds and share of the whole run."""
        rows = [
            *self.passes,
            *((f"({name})", cost) for name, cost in self.instruments.items()),
            ("total", self.total),
        ]
        width = max(len(name) for name, _ in rows)
        whole = max(self.total, 1e-12)
        return "\n".join(f"{name:<{width}}  {seconds:9.3f} s  {seconds / whole:6.1%}" for name, seconds in rows)
