"""Which pass, and which match inside it, loses the accuracy."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from mxfx.config.pipeline import BudgetConfig, ModelConfig, Pipeline
from mxfx.config.text import to_text
from mxfx.graph.execute import executable
from mxfx.graph.program import Program
from mxfx.ground.errors import CheckError
from mxfx.pipeline.manager import PassError, StopPoint, check_pipeline
from mxfx.pipeline.opt import command
from mxfx.pipeline.probe import Probe, mean_kl
from mxfx.rewrite import Applied, Context, Match, Pass, apply


class NothingFound(CheckError, ValueError):
    """The whole pipeline stays below the threshold, or the programs cannot be run."""


@dataclass(frozen=True)
class Culprit:
    """The first step that takes KL over the threshold: ``good`` and ``bad`` are the points on either side of it."""

    pass_: Pass
    good: StopPoint
    bad: StopPoint
    kl_good: float
    kl_bad: float
    match: Match | None
    commands: tuple[str, str]

    def __str__(self) -> str:
        where = (
            f", match {self.match.index} at {self.match.path or self.match.node} ({self.match.note})"
            if self.match
            else ""
        )
        return (
            f"pass {self.bad.number} {self.pass_.name!r}{where} takes KL "
            f"from {self.kl_good:.4g} to {self.kl_bad:.4g} nats\n"
            f"before: {self.commands[0]}\nafter:  {self.commands[1]}"
        )


def bisect(
    program: Program,
    pipeline: Pipeline,
    ctx: Context | None = None,
    *,
    max_kl: float = 0.05,
    probe: Probe | None = None,
    source: str | None = None,
) -> Culprit:
    """Find the pass, then the match, after which the mean KL of the next-token distribution exceeds ``max_kl`` nats.

    Compares with ``program`` itself on the probe's ids. Passes run in order until one crosses; inside it the match is
    found by halving (``m`` matches stay below, ``m + 1`` do not). A pass that is ``required`` cannot be half done
    and is named as a whole. Nothing is kept outside this call. ``source`` names the model in the printed commands.

    Raises ``NothingFound`` if no pass crosses the threshold, ``PassError`` for a pass that fails.
    """
    if pipeline.phases.given:
        raise NothingFound(
            "bisect follows one program, and the pipeline makes one for each phase; put the rules of the phase that "
            "you look for into annotate, and leave [phases] out"
        )
    passes = check_pipeline(program, pipeline)
    reason = executable(program)
    if reason is not None:
        raise NothingFound(f"bisect compares numbers, but {reason}")
    ctx = dataclasses.replace(ctx or Context(), reference=program)
    search = _Search(program, ctx, probe or Probe(seed=ctx.seed))
    before, kl_before = program, 0.0
    for number, pass_ in enumerate(passes, start=1):
        search.number = number
        applied = search.apply(pass_, before)
        kl = search.kl(applied.program)
        if not kl <= max_kl:
            good, bad, kl_good, kl_bad = search.inside(
                pass_, before, len(applied.record.matches), kl_before, kl, max_kl
            )
            match = applied.record.matches[bad - 1] if bad else None
            points = (
                (StopPoint(number, good), StopPoint(number, bad)) if bad else (StopPoint(number, 0), StopPoint(number))
            )
            name, text = source or program.source.name, to_text(_unnamed(pipeline))
            first, second = (command(name, text, point, program.dtype) for point in points)
            return Culprit(pass_, *points, kl_good, kl_bad, match, (first, second))
        before, kl_before = applied.program, kl
    raise NothingFound(
        f"KL ends at {kl_before:.4g} nats, which is within {max_kl:g}; lower the threshold to look closer"
    )


def _unnamed(pipeline: Pipeline) -> Pipeline:
    """Without model and budget: the command names its source itself, and a half-run pipeline has no budget to keep."""
    return pipeline.replace(model=ModelConfig(), budget=BudgetConfig())


class _Search:
    def __init__(self, program: Program, ctx: Context, probe: Probe) -> None:
        self.ctx = ctx
        self.number = 0
        self.probe = probe
        self.reference = probe.logits(program)

    def apply(self, pass_: Pass, program: Program, limit: int | None = None) -> Applied:
        try:
            return apply(pass_, program, self.ctx, limit=limit)
        except Exception as error:
            raise PassError.of(self.number, pass_, error) from error

    def kl(self, program: Program) -> float:
        return mean_kl(self.probe.logits(program), self.reference)

    def inside(
        self, pass_: Pass, before: Program, matches: int, kl_good: float, kl_bad: float, max_kl: float
    ) -> tuple[int, int, float, float]:
        """``(good, bad, KL, KL)`` with ``bad = good + 1`` matches; bad is 0 if the pass is only wrong as a whole."""
        if pass_.required or matches == 0:
            return 0, 0, kl_good, kl_bad
        good, bad = 0, matches
        while bad - good > 1:
            middle = (good + bad) // 2
            kl = self.kl(self.apply(pass_, before, limit=middle).program)
            if kl <= max_kl:
                good, kl_good = middle, kl
            else:
                bad, kl_bad = middle, kl
        return good, bad, kl_good, kl_bad
