"""What ``run`` and ``eval`` share: float models with their logits and texts, models measured beside them, tables."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mxfx.config import Pipeline
from mxfx.driver.check import check
from mxfx.driver.fitting import fitting_lm
from mxfx.driver.job import Job
from mxfx.driver.options import RunOptions
from mxfx.driver.proof import inexact_told
from mxfx.evaluation.evaluate import Domain
from mxfx.evaluation.results import EvalResult, ratio_with_stderr
from mxfx.evaluation.scoring import FloatLogits
from mxfx.evaluation.suite import Evaluation, Suite
from mxfx.graph.program import Program
from mxfx.ground import ranks
from mxfx.ground.clock import part
from mxfx.report.table import DomainRow, Row

#: Name, dtype and revision of a model.
_Key = tuple[str, str, str | None]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A model and what it scores. ``warnings`` are about the model and the figures.

    ``compile_seconds`` is None for one that was not compiled now.
    """

    name: str
    evaluation: Evaluation | None
    bits_per_weight: float
    compile_seconds: float | None = None
    baseline: str = ""
    """Name of the float model that this one is compared with; its own for the float model, ``""`` without one."""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Summary:
    """What the tables of a command show, and its warnings, each behind the name of its model."""

    rows: tuple[Row, ...]
    domains: tuple[DomainRow, ...]
    tasks: tuple[tuple[str, str, str, float, float | None], ...]
    warnings: tuple[str, ...]
    first: EvalResult | None
    """On the main text, whichever model was the first to read it."""

    @classmethod
    def of(cls, models: Sequence[Measured]) -> Summary:
        evaluated = [(one.name, one.evaluation) for one in models if one.evaluation is not None]
        return cls(
            tuple(rows(models)),
            tuple(domain_rows(models)),
            tuple((name, *row) for name, found in evaluated for task in found.tasks.values() for row in task.rows()),
            tuple(f"{one.name}: {warning}" for one in models for warning in one.warnings),
            next((found.first for _, found in evaluated), None),
        )


@dataclass
class FloatModel:
    """A job that several models share, and the row that they are compared with.

    ``meta`` is its program without weights; ``suite`` is what they are evaluated on, ``reference`` the float model's
    logits there; None where nothing is.
    """

    job: Job
    meta: Program
    suite: Suite | None = None
    reference: FloatLogits | None = None
    baseline: str = ""


class FloatModels:
    """The float models of a command, each loaded when it is first asked for."""

    def __init__(self, options: RunOptions) -> None:
        self._options = options
        self._known: dict[_Key, FloatModel] = {}

    def of(self, pipeline: Pipeline) -> FloatModel:
        """The model of a pipeline, which is checked against it. Raises ``ConfigError``, ``ModelError``."""
        options, trust = self._options, self._options.trust_remote_code
        name, dtype, _ = key = (str(pipeline.model_source()), pipeline.model.dtype, pipeline.model.revision)
        known = self._known.get(key)
        if known is None:
            options.say(f"tracing {name}")
        with part("check and trace"):
            checked = check(pipeline, trust_remote_code=trust, traced=None if known is None else known.meta)
        if known is not None:
            return known
        with part("load and prove"):
            job = Job.without_weights(pipeline, checked.program, options.device, trust_remote_code=trust)
            found = _model(job, checked.program, options)
            options.say(f"loading {name} in {dtype}")
            job.read_weights(pipeline, trust_remote_code=trust)
            if found.suite is not None:
                # Answers are written now: the model that writes them is not held for the passes.
                _ = found.suite.domains
            self._known[key] = found
        if options.float_row:
            found.baseline = baseline_name(key, [one.baseline for one in self._known.values()])
        return found


def baseline_name(model: _Key, taken: Collection[str]) -> str:
    """Of the row of a float model: a command over several models or precisions has one for each, under its own name."""
    name, dtype, revision = model
    whole = f"float {name} {dtype}" if revision is None else f"float {name}@{revision} {dtype}"
    return next(called for called in ("float", f"float {Path(name).name} {dtype}", whole) if called not in taken)


def float_pipeline(job: Job) -> Pipeline:
    """The pipeline that a float model runs as: raised and emitted, nothing else."""
    return Pipeline([]).completed().emitted(job.device.type)


def _model(job: Job, meta: Program, options: RunOptions) -> FloatModel:
    """With what it is evaluated on: text that cannot be read is refused before weights are."""
    wanted = options.wanted()
    if wanted is None:
        return FloatModel(job, meta)

    def chat(*how: Any) -> Domain:
        assert job.texts is not None
        return job.texts.chat(*how)

    suite = Suite(wanted, job.tokenizer, meta.source.config.get("max_position_embeddings"), chat)

    def float_model() -> object:
        # Each rank makes it when it first asks.
        with ranks.alone():
            return fitting_lm(job.run(float_pipeline(job)).program, job.device, wanted.batch_size)

    return FloatModel(job, meta, suite, FloatLogits(float_model))


def measured(lm: Any, suite: Suite, reference: FloatLogits | None, warnings: list[str]) -> Evaluation:
    """What a model scores on everything, and into ``warnings`` what is to be told of the figures."""
    with inexact_told(warnings):
        found = suite.run(lm, reference)
    if reference is not None:
        # Passes need the device for themselves.
        reference.release()
    for name, domain in found.domains.items():
        if not math.isfinite(domain.token_perplexity):
            warnings.append(f"the token perplexity on {name} is {domain.token_perplexity}")
    return found


def rows(models: Sequence[Measured]) -> list[Row]:
    """The table's rows; a model's figures are compared with those of its float model."""
    evaluations = {one.name: one.evaluation for one in models}
    return [_row(one, _first(evaluations.get(one.baseline))) for one in models]


def _first(evaluation: Evaluation | None) -> EvalResult | None:
    return None if evaluation is None else evaluation.first


def domain_rows(models: Sequence[Measured]) -> list[DomainRow]:
    """Every domain of every model, beside its float model's."""
    evaluations = {one.name: one.evaluation for one in models}
    found = []
    for one in models:
        baseline = evaluations.get(one.baseline)
        for name, result in one.evaluation.domains.items() if one.evaluation is not None else ():
            ratio = None
            if baseline is not None and baseline is not one.evaluation:
                ratio = ratio_with_stderr(result, baseline.domains[name], "token_perplexity")
            found.append(DomainRow.of(one.name, result, ratio))
    return found


def ratios(models: Sequence[Measured]) -> dict[str, dict[str, list[float | None]]]:
    """By model and domain: the ratio of token perplexities to the float model's, and its standard error."""
    domains = [row for row in domain_rows(models) if row.ratio is not None]
    return {o.name: {r.domain: [r.ratio, r.ratio_stderr] for r in domains if r.name == o.name} for o in models}


def _row(one: Measured, baseline: EvalResult | None) -> Row:
    evaluation = _first(one.evaluation)
    row: dict[str, float | None] = {
        "bits_per_weight": one.bits_per_weight,
        "compile_seconds": one.compile_seconds,
    }
    if evaluation is not None:
        row |= {
            "word_perplexity": evaluation.word_perplexity,
            "token_perplexity": evaluation.token_perplexity,
            "eval_seconds": one.evaluation.seconds if one.evaluation is not None else None,
        }
    if evaluation is not None and baseline is not None:
        ratio = ratio_with_stderr(evaluation, baseline)
        row |= {
            "ratio": ratio.ratio,
            "ratio_stderr": ratio.stderr,
            "token_ratio": evaluation.token_perplexity / baseline.token_perplexity,
        }
    return Row(one.name, warnings=len(one.warnings), **row)
