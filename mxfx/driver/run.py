"""``mxfx run``: every pipeline over its model, evaluated, saved, proved; one row each."""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from mxfx.config import Pipeline, to_toml
from mxfx.driver.check import check
from mxfx.driver.fitting import fit, fitting_lm
from mxfx.driver.job import Job, default_instruments
from mxfx.driver.options import RunOptions
from mxfx.driver.proof import check_saved, inexact_told, logits_of, not_finite
from mxfx.driver.run_directory import PipelineFolder, RunDirectory
from mxfx.evaluation.results import EvalResult, ratio_with_stderr
from mxfx.evaluation.scoring import FloatLogits
from mxfx.evaluation.suite import Evaluation, Suite
from mxfx.graph.phases import entries
from mxfx.graph.program import Program
from mxfx.ground import ranks
from mxfx.ground.clock import Clock, part
from mxfx.ground.files import write_json
from mxfx.ground.versions import version
from mxfx.ops.kernels.build import build_ahead
from mxfx.pipeline.instruments import Numbers, Verify
from mxfx.pipeline.manager import PipelineResult
from mxfx.report.linears import linears_of
from mxfx.report.memory import memory
from mxfx.report.results import coverage_json, instruments_json, pass_json
from mxfx.report.table import DomainRow, Row, card_table
from mxfx.report.weight_history import History
from mxfx.rewrite.size import bits_per_weight
from mxfx.runtime.causal_lm import as_causal_lm

_PHASES_NOTE = "{name}: its prefill, whole windows; {name} decode: its program of single steps, on the same windows"


@dataclass(frozen=True)
class Named:
    """A pipeline with the name of its row and the file that it came from."""

    name: str
    file: str
    pipeline: Pipeline


@dataclass(frozen=True)
class Outcome:
    """One pipeline's run: what each pass did, and what the emitted model scores.

    ``file`` is ``""`` for a float model. ``warnings`` are about the model, the passes and the figures.
    """

    name: str
    file: str
    pipeline: Pipeline
    result: PipelineResult
    evaluation: Evaluation | None
    bits_per_weight: float
    compile_seconds: float
    baseline: str
    """Name of the float model's outcome that this one is compared with."""
    model_note: str = ""
    warnings: tuple[str, ...] = ()
    phase: str = ""
    """Of a pipeline with phases: whose outcome it is."""
    data_notes: tuple[str, ...] = ()
    """About the calibration data: what was read more than once."""


@dataclass(frozen=True)
class RunSummary:
    """All rows of a run: the float model first, then each pipeline."""

    outcomes: tuple[Outcome, ...]
    rows: tuple[Row, ...]
    domains: tuple[DomainRow, ...]
    tasks: tuple[tuple[str, str, str, float, float | None], ...]
    warnings: tuple[str, ...]
    out: Path | None


#: Name, dtype and revision of a model.
_Key = tuple[str, str, str | None]


@dataclass
class _Model:
    """A job that several pipelines share, and the row that they are compared with.

    ``meta`` is its program without weights; ``suite`` is what they are evaluated on, ``reference`` the float model's
    logits there; None where nothing is.
    """

    job: Job
    meta: Program
    suite: Suite | None = None
    reference: FloatLogits | None = None
    baseline: str = ""


def run(pipelines: Sequence[Named], options: RunOptions) -> RunSummary:
    """Check, trace, rewrite, evaluate, save, prove, write. ``pipelines`` are whole: their emit stages are in them.

    Raises ``RunError`` and ``ConfigError`` before weights are read, ``PassError``, ``ProofError`` and what instruments
    raise after.
    """
    outcomes: list[Outcome] = []
    models: dict[_Key, _Model] = {}
    if options.device == "cpu":
        build_ahead()
    with ExitStack() as stack:
        clock = stack.enter_context(Clock().running())
        mine = options.out is not None and ranks.is_first()
        directory = stack.enter_context(RunDirectory(options.out)) if mine else None
        for index, named in enumerate(pipelines):
            model = model_of(named.pipeline, models, outcomes, options)
            if directory is not None and index == 0:
                directory.begin()
            found = _run_one(named, model, directory, options)
            outcomes += found
            if directory is not None:
                if options.save:
                    _write_card(outcomes, found, directory.pipeline(named.name))
                directory.write_results(document(outcomes, options, clock))
    warnings = tuple(f"{o.name}: {warning}" for o in outcomes for warning in o.warnings)
    tasks = tuple(
        (outcome.name, *row)
        for outcome in outcomes
        for result in (outcome.evaluation.tasks.values() if outcome.evaluation is not None else ())
        for row in result.rows()
    )
    return RunSummary(
        tuple(outcomes), tuple(rows(outcomes)), tuple(domain_rows(outcomes)), tasks, warnings, options.out
    )


def model_of(pipeline: Pipeline, models: dict[_Key, _Model], outcomes: list[Outcome], options: RunOptions) -> _Model:
    """The loaded model of a pipeline; the first time also the row of its float form."""
    name, dtype, _ = key = (str(pipeline.model_source()), pipeline.model.dtype, pipeline.model.revision)
    known = models[key].meta if key in models else None
    with part("check and trace"):
        checked = check(pipeline, trust_remote_code=options.trust_remote_code, traced=known)
    if key not in models:
        options.say(f"loading {name} in {dtype}")
        trust = options.trust_remote_code
        with part("load and prove"):
            job = Job.load(pipeline, checked.program, options.device, trust_remote_code=trust)
            models[key] = _loaded(job, checked.program, options)
        if options.float_row:
            # A run over several models or precisions has a float row for each.
            models[key].baseline = "float" if len(models) == 1 else f"float {Path(name).name} {dtype}"
            outcomes.append(_float_outcome(models[key], options))
    return models[key]


def _loaded(job: Job, meta: Program, options: RunOptions) -> _Model:
    wanted = options.wanted()
    if wanted is None:
        return _Model(job, meta)
    longest = job.program.source.config.get("max_position_embeddings")
    suite = Suite(wanted, job.tokenizer, longest, None if job.texts is None else job.texts.chat)
    pipeline = Pipeline([]).completed().emitted(job.device.type)

    def float_model() -> object:
        # Each rank makes it when it first asks.
        with ranks.alone():
            return fitting_lm(job.run(pipeline).program, job.device, wanted.batch_size)

    reference = FloatLogits(float_model)
    return _Model(job, meta, suite, reference)


def _float_outcome(model: _Model, options: RunOptions) -> Outcome:
    pipeline = Pipeline([]).completed().emitted(model.job.device.type)
    result = model.job.run(pipeline, [Numbers(), Verify()])
    if model.suite is not None:
        batch = model.suite.batch_size
        model.reference = FloatLogits(lambda: fitting_lm(result.program, model.job.device, batch))
    options.say("evaluating the float model") if options.eval else None
    return _outcome(Named(model.baseline, "", pipeline), model, result, 0.0, options)[0]


def _run_one(named: Named, model: _Model, directory: RunDirectory | None, options: RunOptions) -> list[Outcome]:
    """What came out: of a pipeline with phases the prefill's outcome, then that of decode's program."""
    job, pipeline = model.job, named.pipeline
    folder = None if directory is None else directory.pipeline(named.name)
    options.say(f"running {named.name}: {len(pipeline.specs)} passes")
    if folder is not None:
        folder.begin(to_toml(pipeline))
    started = time.perf_counter()
    instruments = default_instruments(pipeline, *((folder.ir, folder.repro) if folder else ()))
    cache = None if folder is None else folder.cache
    result = job.run(pipeline, instruments, cache=cache, strict=options.strict)
    seconds = time.perf_counter() - started
    for told in job.data_notes(pipeline):
        options.say(f"{named.name}: calibration: {told}")
    if folder is not None:
        write_json(folder.weights, History.of(job.program, result.before_emit).to_json(), indent=1)
    options.say(f"evaluating {named.name}") if options.eval else None
    return _outcome(named, model, result, seconds, options, folder)


def _outcome(
    named: Named,
    model: _Model,
    result: PipelineResult,
    seconds: float,
    options: RunOptions,
    folder: PipelineFolder | None = None,
) -> list[Outcome]:
    """Save, prove, evaluate each phase; everything that is not as it should be becomes a warning."""
    job, program = model.job, result.program
    warnings = [*job.warnings] if not named.file or not model.baseline else []
    warnings += [f"{step.called}: {text}" for step in result.steps for text in step.record.warnings]
    ids = job.probe(named.pipeline).tokens(job.program)
    fitted = fit(program, job.device, 1 if model.suite is None else model.suite.batch_size)
    if not fitted.whole:
        warnings.append(f"run in pieces, which is slow: the emitted model does not fit on {job.device} ({fitted})")
    logits = logits_of(program, ids, job.device, whole=fitted.whole)
    warnings += [problem for found in logits.values() if (problem := not_finite(found))]
    if folder is not None and options.save:
        files = None if fitted.whole else folder.cache / "weights"
        with ranks.alone(), part("save and prove"):
            _save(result.portable, job, folder)
            check_saved(folder.model, logits, ids, job.device, named.pipeline.emit, files=files)
    del logits
    note = str(program.source.config.get("mxfx_note", ""))
    notes = job.data_notes(named.pipeline) if named.file else ()
    outcomes = []
    for phase in entries(program):
        mine = result.of(phase)
        evaluation = _evaluate(mine.program, model, warnings, is_float=not named.file, whole=fitted.whole)
        if folder is not None and evaluation is not None:
            evaluation.write(folder.path / phase if phase == "decode" else folder.path)
        bits = bits_per_weight(mine.before_emit)
        name = f"{named.name} decode" if phase == "decode" else named.name
        told = _PHASES_NOTE.format(name=named.name) if phase else note
        about = (name, named.file, named.pipeline, mine, evaluation, bits, seconds, model.baseline, told)
        outcomes.append(Outcome(*about, tuple(warnings), phase, notes))
        warnings = []
    return outcomes


def _evaluate(
    program: Program, model: _Model, warnings: list[str], *, is_float: bool, whole: bool
) -> Evaluation | None:
    if model.suite is None:
        return None
    assert model.reference is not None
    lm = model.reference.model if is_float else as_causal_lm(program, model.job.device, whole=whole)
    with inexact_told(warnings):
        found = model.suite.run(lm, model.reference)
    # Passes need the device for themselves.
    model.reference.release()
    for name, domain in found.domains.items():
        if not math.isfinite(domain.token_perplexity):
            warnings.append(f"the token perplexity on {name} is {domain.token_perplexity}")
    return found


def _save(program: Program, job: Job, folder: PipelineFolder) -> None:
    from mxfx.export.folder import save_folder

    save_folder(program, folder.model, tokenizer=job.tokenizer)


def _write_card(outcomes: Sequence[Outcome], last: Sequence[Outcome], folder: PipelineFolder) -> None:
    """The saved model's card again, with the figures that its last outcomes found after it was saved."""
    from mxfx.export.folder import write_card

    outcome, names = last[0], {one.name for one in last}
    if found := [row for row in domain_rows(outcomes) if row.name in names]:
        write_card(outcome.result.portable, folder.model, card_table(found, outcome.bits_per_weight))


def rows(outcomes: Sequence[Outcome]) -> list[Row]:
    """The table's rows; a pipeline's figures are compared with those of its float model."""
    evaluations = {outcome.name: outcome.evaluation for outcome in outcomes}
    return [_row(outcome, _first(evaluations.get(outcome.baseline))) for outcome in outcomes]


def _first(evaluation: Evaluation | None) -> EvalResult | None:
    return None if evaluation is None else evaluation.first


def domain_rows(outcomes: Sequence[Outcome]) -> list[DomainRow]:
    """Every domain of every pipeline, beside its float model's."""
    evaluations = {outcome.name: outcome.evaluation for outcome in outcomes}
    found = []
    for outcome in outcomes:
        baseline = evaluations.get(outcome.baseline)
        for name, result in outcome.evaluation.domains.items() if outcome.evaluation is not None else ():
            ratio = None
            if baseline is not None and baseline is not outcome.evaluation:
                ratio = ratio_with_stderr(result, baseline.domains[name], "token_perplexity")
            found.append(DomainRow.of(outcome.name, result, ratio))
    return found


def _row(outcome: Outcome, baseline: EvalResult | None) -> Row:
    evaluation = _first(outcome.evaluation)
    row: dict[str, float | None] = {
        "bits_per_weight": outcome.bits_per_weight,
        "compile_seconds": outcome.compile_seconds,
    }
    if evaluation is not None:
        row |= {
            "word_perplexity": evaluation.word_perplexity,
            "token_perplexity": evaluation.token_perplexity,
            "eval_seconds": outcome.evaluation.seconds if outcome.evaluation is not None else None,
        }
    if evaluation is not None and baseline is not None:
        ratio = ratio_with_stderr(evaluation, baseline)
        row |= {
            "ratio": ratio.ratio,
            "ratio_stderr": ratio.stderr,
            "token_ratio": evaluation.token_perplexity / baseline.token_perplexity,
        }
    return Row(outcome.name, warnings=len(outcome.warnings), **row)


def document(outcomes: Sequence[Outcome], options: RunOptions, clock: Clock) -> dict[str, object]:
    """``results.json``: versions, machine, where the time went until now, and for each pipeline its figures, passes,
    coverage, evaluation.
    """
    figures = {row.name: row for row in rows(outcomes)}
    domains = [row for row in domain_rows(outcomes) if row.ratio is not None]
    ratios = {o.name: {r.domain: [r.ratio, r.ratio_stderr] for r in domains if r.name == o.name} for o in outcomes}
    return {
        "mxfx": version("mxfx"),
        "versions": {name: version(name) for name in ("torch", "transformers", "lm-eval")},
        "machine": {"platform": platform.platform(), "device": options.device, "cores": os.cpu_count()},
        "time": {name: vars(spent) for name, spent in clock.parts.items()},
        "configs": [
            {**_as_json(outcome, figures[outcome.name]), "ratios": ratios[outcome.name]} for outcome in outcomes
        ],
    }


def _as_json(outcome: Outcome, row: Row) -> dict[str, object]:
    steps = outcome.result.steps
    return {
        "name": outcome.name,
        **({"phase": outcome.phase} if outcome.phase else {}),
        "file": outcome.file,
        "model_note": outcome.model_note,
        "figures": vars(row),
        "warnings": outcome.warnings,
        **({"calibration": outcome.data_notes} if outcome.data_notes else {}),
        "passes": [pass_json(step) for step in steps] if outcome.file and outcome.phase != "decode" else [],
        "time": instruments_json(outcome.result) if outcome.file else None,
        "coverage": coverage_json(outcome.result) if outcome.file else None,
        "memory": memory(outcome.result.program).to_json(),
        "linears": [one.to_json() for one in linears_of(outcome.result.program, steps)] if outcome.file else None,
        "evaluation": None if outcome.evaluation is None else outcome.evaluation.to_json(),
    }
