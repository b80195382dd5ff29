"""``mxfx search``: which kinds of matmul gain from an online rotation, found before a model is emitted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from mxfx.config import Pipeline
from mxfx.config.spec import NOWHERE, PassSpec
from mxfx.driver.check import check
from mxfx.driver.job import Job, default_instruments
from mxfx.driver.options import RunOptions
from mxfx.ground.progress import announced
from mxfx.passes import RotationSearch
from mxfx.pipeline.manager import PipelineResult

_T = TypeVar("_T")


@dataclass(frozen=True)
class Round:
    """One round: the perplexity ``before`` it, of every type ``tried`` beside those that are rotated, ``after`` it.

    ``winner`` is None where none gained enough: the last round of a search that stopped.
    """

    number: int
    rotated: tuple[str, ...]
    before: float
    tried: dict[str, float]
    winner: str | None
    after: float

    def __str__(self) -> str:
        best = min(self.tried, key=self.tried.__getitem__)
        if self.winner is None:
            return f"round {self.number}: stopped at {self.before:.4f}; the best left is {best}, {self.tried[best]:.4f}"
        change = self.after - self.before
        return f"round {self.number}: +{self.winner}, perplexity {self.before:.4f} -> {self.after:.4f} ({change:+.4f})"


@dataclass(frozen=True)
class Found:
    """What a search decided; perplexities are those of its calibration tokens.

    ``nodes`` counts the places of each type. ``from_file`` is where an earlier search had left all of this.
    """

    winners: tuple[str, ...]
    baseline: float
    perplexity: float
    steps: tuple[dict[str, Any], ...]
    nodes: dict[str, int]
    from_file: str | None
    warnings: tuple[str, ...]

    @classmethod
    def of(cls, result: PipelineResult) -> Found:
        """Of the ``rotation-search`` that ran in a pipeline."""
        record = next(step.record for step in result.steps if step.pass_.name == RotationSearch.name)
        details: dict[str, Any] = dict(record.details)
        return cls(
            winners=tuple(details["winners"]),
            baseline=details["baseline"],
            perplexity=details["perplexity"],
            steps=tuple(details["steps"]),
            nodes=details.get("nodes", {}),
            from_file=details.get("from_file"),
            warnings=tuple(record.warnings),
        )

    def rounds(self) -> Iterator[Round]:
        rotated: tuple[str, ...] = ()
        before = self.baseline
        for number, step in enumerate(self.steps, start=1):
            tried, winner = step["perplexity"], step["winner"]
            after = before if winner is None else tried[winner]
            yield Round(number, rotated, before, tried, winner, after)
            rotated, before = (rotated, before) if winner is None else ((*rotated, winner), after)

    def lines(self) -> Iterator[str]:
        """One line a round, then what was found."""
        yield from map(str, self.rounds())
        if self.from_file is not None:
            yield f"read from {self.from_file}: the same program, tokens and options were searched before"
        found = ", ".join(self.winners) or "nothing"
        yield f"rotate {found}: perplexity {self.baseline:.4f} -> {self.perplexity:.4f}"


def search(pipeline: Pipeline, options: RunOptions, given: dict[str, Any]) -> Found:
    """Run ``pipeline`` as far as its ``rotation-search``, with the options ``given``; no model is emitted.

    A pipeline that lists none searches where it could: before activations and caches are quantized. Every round is
    said in one line when it begins.

    Raises ``ConfigError``, ``PassError``, and what ``mxfx run`` raises before and in these passes.
    """
    pipeline = up_to_search(pipeline, given)
    checked = check(pipeline, trust_remote_code=options.trust_remote_code)
    job = Job.load(pipeline, checked.program, options.device, trust_remote_code=options.trust_remote_code)

    def progress(items: Iterable[_T], description: str, total: int | None = None) -> Iterator[_T]:
        options.say(announced(description, total))
        return iter(items)

    job.progress = progress
    return Found.of(job.run(pipeline, default_instruments(pipeline)))


def up_to_search(pipeline: Pipeline, given: dict[str, Any]) -> Pipeline:
    """The passes up to ``rotation-search``, which has the options ``given`` beside its own."""
    at = next((i for i, spec in enumerate(pipeline.specs) if spec.name == RotationSearch.name), None)
    if at is None:
        at = next(
            (i for i, p in enumerate(pipeline.passes) if p.provides & RotationSearch.forbids), len(pipeline.specs)
        )
        written: dict[str, Any] = {}
    else:
        written = dict(pipeline.specs[at].options)
    spec = PassSpec.read(RotationSearch.name, written | given, NOWHERE)
    return pipeline.replace(specs=(*pipeline.specs[:at], spec))
