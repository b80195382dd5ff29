"""The programs of a run: one, and one for each phase from where these part."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from mxfx.graph.phases import joined
from mxfx.graph.program import Program
from mxfx.ground.phases import PHASES


@dataclass
class Branch:
    """A program on its way: as it is, as the emit stage found it, as the stage's passes for every device left it."""

    program: Program
    before_emit: Program
    portable: Program

    def take(self, program: Program, *, emitting: bool, portable: bool) -> None:
        """What a pass made of it; ``portable``: a pass of the emit stage that is for every device."""
        self.program = program
        self.before_emit = self.before_emit if emitting else program
        self.portable = program if portable or not emitting else self.portable


@dataclass
class Branches:
    """``shared`` until the first pass of a phase, then a branch for each."""

    shared: Branch
    handoff: str
    parted: dict[str, Branch] = field(default_factory=dict)

    def of(self, phase: str) -> Branch:
        """The branch of a phase, ``""`` for both."""
        if not phase:
            return self.shared
        if not self.parted:
            self.parted = {name: replace(self.shared) for name in PHASES}
        return self.parted[phase]

    def peer(self, phase: str) -> Program | None:
        """The program of the other phase, as far as that is."""
        return next((self.of(name).program for name in PHASES if phase and name != phase), None)

    def end(self, phase: str, *, whole: bool) -> Branch:
        """What the run ends with: both phases in one, or, not ``whole``, what the last pass made for its ``phase``.

        Raises ``PhaseError`` for programs of which no cache can go from one to the other.
        """
        if not self.parted or not whole:
            return self.of(phase)
        prefill, decode = (self.parted[name] for name in PHASES)
        first = joined(prefill.before_emit, decode.before_emit, self.handoff)
        assert first.phases is not None
        rest = (self.handoff, first.phases.onto)
        return Branch(
            joined(prefill.program, decode.program, *rest), first, joined(prefill.portable, decode.portable, *rest)
        )
