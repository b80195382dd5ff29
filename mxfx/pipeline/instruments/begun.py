"""A line for each pass that begins: most of them show no bar, and a log no bars at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mxfx.pipeline.manager import Instrument, Step


@dataclass
class Begun(Instrument):
    """Tells ``say`` the number of each pass, of how many, and its name."""

    say: Callable[[str], None]

    def before(self, step: Step) -> None:
        of = f" of {step.phase}" if step.phase else ""
        self.say(f"pass {step.index} of {len(step.run.passes)}: {step.pass_.name}{of}")
