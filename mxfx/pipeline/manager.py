"""Run passes in order, with instruments around them.

The manager checks the order, runs each pass, and calls the hooks of its instruments; it knows none of them by name.
Timing, dumps, verification, numbers, budgets and reproducers are instruments (``mxfx.pipeline.instruments``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

from mxfx.config.emit import PORTABLE, emit_start
from mxfx.config.order import check_order
from mxfx.config.phases import unrolled
from mxfx.config.pipeline import Pipeline
from mxfx.graph.phases import entries
from mxfx.graph.program import Program
from mxfx.ground.clock import Clock, Spent, part
from mxfx.ground.errors import MxfxError
from mxfx.pipeline.agree import agree
from mxfx.pipeline.branches import Branch, Branches
from mxfx.pipeline.idle import DID_NOTHING, idle_warning, is_idle, unmet
from mxfx.pipeline.probe import Probe
from mxfx.rewrite import Context, FactError, Pass, PassRecord, apply, check_facts_before, facts_after

#: ``(position of the pass from 0, path of an option)`` → ``FILE:LINE:COLUMN`` where it stands, None if nobody knows.
Locate = Callable[[int, tuple], "str | None"]

#: What passes take, beside instruments, on a run's clock.
PASSES = "passes"

_About = TypeVar("_About")


class PassError(MxfxError, ValueError):
    """A pass failed; the message names it, its place in the pipeline file, and the reason (``__cause__``)."""

    @classmethod
    def of(cls, number: int, pass_: Pass, error: Exception, place: str | None = None) -> PassError:
        return cls(f"{place + ': ' if place else ''}pass {number} {pass_.name!r}: {_said(error)}")


def _said(error: Exception) -> str:
    """An error of ours or a check of values in its own words; of any other kind, that kind first."""
    return str(error) if isinstance(error, MxfxError | ValueError) else f"{type(error).__name__}: {error}"


@dataclass(frozen=True)
class StopPoint:
    """``n`` or ``n.m``: stop after pass ``n``, or after match ``m`` of it; both count from 1, ``n.0`` is before it."""

    number: int
    match: int | None = None

    @classmethod
    def parse(cls, text: str) -> StopPoint:
        """Raises ``ValueError`` for anything but ``n`` or ``n.m``."""
        number, dot, match = text.partition(".")
        if not number.isdecimal() or int(number) < 1 or (dot and not match.isdecimal()):
            raise ValueError(f"{text!r} is no stop point: expected the number of a pass (3) or pass and match (3.2)")
        return cls(int(number), int(match) if dot else None)

    def __str__(self) -> str:
        return str(self.number) if self.match is None else f"{self.number}.{self.match}"


@dataclass
class Step:
    """One pass of a run, as instruments see it.

    ``index`` counts from 1. ``after`` and ``record`` are there once the pass has run. ``findings`` holds what
    instruments measured, by the instrument's name, as JSON values.
    """

    run: Run
    index: int
    pass_: Pass
    before: Program
    place: str | None
    limit: int | None = None
    ctx: Context = field(default_factory=Context)
    phase: str = ""
    """The phase that the pass runs for, ``""`` for both."""
    after: Program | None = None
    record: PassRecord | None = None
    findings: dict[str, object] = field(default_factory=dict)

    @property
    def changed(self) -> bool:
        return self.record is not None and self.record.changed

    @property
    def title(self) -> str:
        """``pass 4 'fuse-norm' (a.toml:12:1)``, for messages."""
        of = f" of {self.phase}" if self.phase else ""
        return f"pass {self.index} {self.pass_.name!r}{of}" + (f" ({self.place})" if self.place else "")


@dataclass
class Run:
    """What a whole run has in common: source program, passes, context, and probe inputs that instruments share."""

    source: Program
    passes: tuple[Pass, ...]
    ctx: Context
    locate: Locate
    probe: Probe
    phases: tuple[str, ...] = ()
    handoff: str = ""
    steps: list[Step] = field(default_factory=list)
    clock: Clock = field(default_factory=Clock)
    """Time spent in all ``passes``, and in the hooks of each instrument, by its class's name."""


class Instrument:
    """Hooks around the passes of a run. Subclasses override what they need; an exception stops the run."""

    def enter(self, run: Run) -> None:
        """Before the first pass."""

    def before(self, step: Step) -> None:
        """Before a pass: ``step.after`` and ``step.record`` are None."""

    def after(self, step: Step) -> None:
        """After a pass that succeeded."""

    def failed(self, step: Step, error: Exception) -> None:
        """A pass, or an instrument after it, raised ``error``, which goes on after this hook."""

    def exit(self, run: Run) -> None:
        """After the last pass, and after a failure."""


@dataclass(frozen=True)
class StepResult:
    """What is kept of a step: no programs, so that weights of intermediate programs can go."""

    index: int
    pass_: Pass
    place: str | None
    record: PassRecord
    findings: dict[str, object]
    phase: str = ""

    @property
    def called(self) -> str:
        """The pass's name, and the phase that it ran for."""
        return f"{self.pass_.name} ({self.phase})" if self.phase else self.pass_.name


@dataclass(frozen=True)
class PipelineResult:
    """The program after a pipeline, and the account of every pass.

    ``before_emit`` is the program that the emit stage began with: dialect ops, formats and all. ``portable`` is what
    its passes for every device made of it: the program that is saved, and emitted anew for the device that opens it.
    Of a pipeline with phases each is the prefill's, with decode's as its second entry (``Program.phases``).
    """

    program: Program
    before_emit: Program
    portable: Program
    steps: tuple[StepResult, ...]
    time: Mapping[str, Spent] = field(default_factory=dict)
    """What all ``passes`` took, and each instrument, by its class's name."""

    @property
    def records(self) -> tuple[PassRecord, ...]:
        return tuple(step.record for step in self.steps)

    def of(self, phase: str) -> PipelineResult:
        """What was made for one phase: the prefill's whole result, or decode's program with the steps for it."""
        if phase != "decode":
            return self
        steps = tuple(step for step in self.steps if step.phase in ("", phase))
        program, before, portable = (entries(one)[phase] for one in (self.program, self.before_emit, self.portable))
        return PipelineResult(program, before, portable, steps)


def _nowhere(index: int, option: tuple) -> str | None:
    return None


class PassManager:
    """Runs pipelines with a fixed set of instruments, nested like brackets.

    ``enter`` and ``before`` hooks run in the given order, ``after``, ``failed`` and ``exit`` hooks in reverse: the
    first instrument sees what all others found, the last one stands right around the pass.
    """

    def __init__(self, instruments: Sequence[Instrument] = ()) -> None:
        self.instruments = tuple(instruments)

    def run(
        self,
        program: Program,
        passes: Pipeline | Iterable[Pass],
        ctx: Context | None = None,
        locate: Locate | None = None,
        *,
        stop_after: StopPoint | None = None,
        probe: Probe | None = None,
    ) -> PipelineResult:
        """Run ``passes`` on ``program``, which stays as it is.

        ``locate`` finds places for messages (a ``Pipeline`` brings its own). Before anything runs, the order of all
        passes is checked against the facts that hold.

        Raises ``ConfigError`` or ``FactError`` for an impossible order, ``PassError`` where a pass fails, and
        whatever an instrument raises (``VerifyError``, ``NumericsError``, ``BudgetError``).
        """
        typed = check_pipeline(program, passes, locate)
        phases, handoff = ("",) * len(typed), ""
        if isinstance(passes, Pipeline):
            handoff = passes.phases.handoff
            passes, phases = unrolled(passes)
            typed = passes.passes
        locate = locate or _locate_in(passes)
        ctx = ctx or Context()
        ctx = dataclasses.replace(ctx, reference=ctx.reference or program)
        run = Run(program, typed, ctx, locate, probe or Probe(seed=ctx.seed), phases, handoff)
        for instrument in self.instruments:
            _timed(run, instrument, instrument.enter, run)
        try:
            return self._run(run, stop_after)
        finally:
            for instrument in reversed(self.instruments):
                instrument.exit(run)

    def _run(self, run: Run, stop: StopPoint | None) -> PipelineResult:
        branches = Branches(Branch(run.source, run.source, run.source), run.handoff)
        done: list[StepResult] = []
        phase = ""
        emission = emit_start([pass_.name for pass_ in run.passes])
        for index, pass_ in enumerate(run.passes, start=1):
            if stop is not None and index > stop.number:
                break
            limit = stop.match if stop is not None and index == stop.number else None
            phase = run.phases[index - 1]
            branch, ctx = branches.of(phase), _context(run, index)
            if phase:
                ctx = dataclasses.replace(ctx, phase=phase, peer=branches.peer(phase), handoff=run.handoff)
            step = Step(run, index, pass_, branch.program, _place(run.locate, index), limit, ctx, phase)
            run.steps.append(step)
            branch.take(self._step(step), emitting=index > emission, portable=pass_.name in PORTABLE)
            assert step.record is not None
            done.append(StepResult(index, pass_, step.place, step.record, step.findings, phase))
            run.steps[-1] = _without_programs(step)
        end = branches.end(phase, whole=stop is None)
        if stop is None:
            _warn_of_unmet(done, end.before_emit)
        return PipelineResult(end.program, end.before_emit, end.portable, _idle_in_both(done), run.clock.parts)

    def _step(self, step: Step) -> Program:
        inner = tuple(reversed(self.instruments))
        try:
            for instrument in self.instruments:
                _timed(step.run, instrument, instrument.before, step)
            with step.run.clock.part(PASSES), part(step.pass_.name):
                _apply(step)
            assert step.after is not None
            agree(step.before, step.after, step.title)
            for instrument in inner:
                _timed(step.run, instrument, instrument.after, step)
        except Exception as error:
            for instrument in inner:
                _tell(instrument, step, error)
            raise
        return step.after


def _idle_in_both(steps: list[StepResult]) -> tuple[StepResult, ...]:
    """The steps without warnings of passes that are idle in one phase and work in the other."""
    for step, other in pairwise(steps):
        if step.phase and other.phase and step.pass_.name == other.pass_.name and step.phase != other.phase:
            idle = [one.record for one in (step, other) if is_idle(one.pass_, one.record)]
            if len(idle) == 1:
                idle[0].warnings = [text for text in idle[0].warnings if not text.startswith(DID_NOTHING)]
    return tuple(steps)


def _warn_of_unmet(steps: list[StepResult], program: Program) -> None:
    """Into the record of each pass, what it expected of the program that the emit stage found."""
    for phase, one in entries(program).items():
        mine = [step for step in steps if step.phase in ("", phase)]
        for index, step in enumerate(mine, start=1):
            step.record.warnings += unmet(step.pass_, one, [later.pass_ for later in mine[index:]])


def _tell(instrument: Instrument, step: Step, error: Exception) -> None:
    """What an instrument cannot do about a failure must not hide the failure."""
    try:
        instrument.failed(step, error)
    except Exception as second:
        error.add_note(f"{type(instrument).__name__} could not record this failure: {type(second).__name__}: {second}")


def _timed(run: Run, instrument: Instrument, hook: Callable[[_About], None], about: _About) -> None:
    with run.clock.part(type(instrument).__name__), part("instruments"):
        hook(about)


def check_pipeline(
    program: Program, passes: Pipeline | Iterable[Pass], locate: Locate | None = None
) -> tuple[Pass, ...]:
    """The typed passes, their order checked against the facts of ``program``. Raises ``ConfigError`` or
    ``FactError``.
    """
    if isinstance(passes, Pipeline):
        check_order(passes, program.facts)
        return passes.passes
    typed = tuple(passes)
    facts = program.facts
    for index, pass_ in enumerate(typed):
        try:
            check_facts_before(pass_, facts)
        except FactError as error:
            place = _place(locate or _nowhere, index + 1)
            raise FactError(f"{place + ': ' if place else ''}pass {index + 1}: {error}") from error
        facts = facts_after(pass_, facts)
    return typed


def _apply(step: Step) -> None:
    try:
        applied = apply(step.pass_, step.before, step.ctx, limit=step.limit)
    except Exception as error:
        place = _place_of_error(step, error)
        raise PassError.of(step.index, step.pass_, error, place) from error
    step.after, step.record = applied.program, applied.record
    if is_idle(step.pass_, applied.record):
        applied.record.warnings.append(idle_warning(step.pass_, applied.record, step.before))


def _place_of_error(step: Step, error: Exception) -> str | None:
    rule = getattr(error, "rule", None)
    if rule is None:
        return step.place
    return step.run.locate(step.index - 1, ("rule", rule - 1, "match")) or step.place


def _locate_in(passes: Pipeline | Iterable[Pass]) -> Locate:
    if not isinstance(passes, Pipeline):
        return _nowhere
    return lambda index, option: _text_of(passes.location(index, option))


def _text_of(place: object) -> str | None:
    return str(place) if getattr(place, "line", 0) else None


def _place(locate: Locate, index: int) -> str | None:
    return locate(index - 1, ("name",))


def _context(run: Run, index: int) -> Context:
    def where(option: tuple) -> str | None:
        place = run.locate(index - 1, option)
        if place is None:
            return None
        # The file's name alone: what a program records must not depend on where its pipeline lay.
        file, line, _ = place.rsplit(":", 2)
        return None if file.startswith(("-", "<")) else f"{Path(file).name}:{line}"

    return dataclasses.replace(run.ctx, where=where)


def _without_programs(step: Step) -> Step:
    return Step(
        step.run,
        step.index,
        step.pass_,
        step.run.source,
        step.place,
        step.limit,
        step.ctx,
        step.phase,
        None,
        step.record,
        step.findings,
    )
