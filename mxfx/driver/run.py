"""``mxfx run``: every pipeline over its model, evaluated, saved, proved; one row each."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from mxfx.config import Pipeline, to_toml
from mxfx.driver.fitting import fit, fitting_lm
from mxfx.driver.job import Job, default_instruments
from mxfx.driver.measure import (
    FloatModel,
    FloatModels,
    Measured,
    Summary,
    domain_rows,
    float_pipeline,
    measured,
    ratios,
    rows,
)
from mxfx.driver.options import RunOptions
from mxfx.driver.proof import check_saved, logits_of, not_finite
from mxfx.driver.run_directory import PipelineFolder, RunDirectory
from mxfx.evaluation.scoring import FloatLogits
from mxfx.evaluation.suite import Evaluation
from mxfx.graph.phases import entries
from mxfx.graph.program import Program
from mxfx.ground import ranks
from mxfx.ground.clock import Clock, part
from mxfx.ground.files import write_json
from mxfx.ground.progress import on_terminal
from mxfx.ground.versions import version
from mxfx.ops.kernels.build import build_ahead
from mxfx.pipeline.instruments import Begun, Numbers, Verify
from mxfx.pipeline.manager import PipelineResult
from mxfx.report.linears import linears_of
from mxfx.report.memory import memory
from mxfx.report.results import coverage_json, instruments_json, pass_json
from mxfx.report.table import Row, card_table
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


@dataclass(frozen=True, kw_only=True)
class Outcome(Measured):
    """One pipeline's run: what each pass did, and what the emitted model scores.

    ``file`` is ``""`` for a float model. Its warnings are also about the passes.
    """

    file: str
    pipeline: Pipeline
    result: PipelineResult
    model_note: str = ""
    phase: str = ""
    """Of a pipeline with phases: whose outcome it is."""
    data_notes: tuple[str, ...] = ()
    """About the calibration data: what was read more than once."""


@dataclass(frozen=True)
class RunSummary(Summary):
    """All rows of a run: the float model first, then each pipeline."""

    outcomes: tuple[Outcome, ...]
    out: Path | None


def run(pipelines: Sequence[Named], options: RunOptions) -> RunSummary:
    """Check, trace, rewrite, evaluate, save, prove, write. ``pipelines`` are whole: their emit stages are in them.

    Raises ``RunError`` and ``ConfigError`` before weights are read, ``PassError``, ``ProofError`` and what instruments
    raise after.
    """
    outcomes: list[Outcome] = []
    models = FloatModels(options)
    if options.device == "cpu":
        build_ahead()
    with ExitStack() as stack:
        clock = stack.enter_context(Clock().running())
        mine = options.out is not None and ranks.is_first()
        directory = stack.enter_context(RunDirectory(options.out)) if mine else None
        for index, named in enumerate(pipelines):
            model = models.of(named.pipeline)
            if model.baseline and all(outcome.name != model.baseline for outcome in outcomes):
                outcomes.append(_float_outcome(model, options))
            if directory is not None and index == 0:
                directory.begin()
            found = _run_one(named, model, directory, options)
            outcomes += found
            if directory is not None:
                if options.save:
                    _write_card(outcomes, found, directory.pipeline(named.name))
                directory.write_results(document(outcomes, options, clock))
    return RunSummary(**vars(Summary.of(outcomes)), outcomes=tuple(outcomes), out=options.out)


def _float_outcome(model: FloatModel, options: RunOptions) -> Outcome:
    pipeline = float_pipeline(model.job)
    result = model.job.run(pipeline, [Numbers(), Verify()])
    if model.suite is not None:
        batch = model.suite.batch_size
        model.reference = FloatLogits(lambda: fitting_lm(result.program, model.job.device, batch))
    options.say("evaluating the float model") if options.eval else None
    return _outcome(Named(model.baseline, "", pipeline), model, result, 0.0, options)[0]


def _run_one(named: Named, model: FloatModel, directory: RunDirectory | None, options: RunOptions) -> list[Outcome]:
    """What came out: of a pipeline with phases the prefill's outcome, then that of decode's program."""
    job, pipeline = model.job, named.pipeline
    folder = None if directory is None else directory.pipeline(named.name)
    options.say(f"running {named.name}: {len(pipeline.specs)} passes")
    if folder is not None:
        folder.begin(to_toml(pipeline))
    started = time.perf_counter()
    instruments = default_instruments(pipeline, *((folder.ir, folder.repro) if folder else ()))
    if not on_terminal():
        instruments.insert(0, Begun(options.say))
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
    model: FloatModel,
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
        outcome = Outcome(
            name=name,
            file=named.file,
            pipeline=named.pipeline,
            result=mine,
            evaluation=evaluation,
            bits_per_weight=bits,
            compile_seconds=seconds,
            baseline=model.baseline,
            model_note=told,
            warnings=tuple(warnings),
            phase=phase,
            data_notes=notes,
        )
        outcomes.append(outcome)
        warnings = []
    return outcomes


def _evaluate(
    program: Program, model: FloatModel, warnings: list[str], *, is_float: bool, whole: bool
) -> Evaluation | None:
    if model.suite is None:
        return None
    assert model.reference is not None
    lm = model.reference.model if is_float else as_causal_lm(program, model.job.device, whole=whole)
    return measured(lm, model.suite, model.reference, warnings)


def _save(program: Program, job: Job, folder: PipelineFolder) -> None:
    from mxfx.export.folder import save_folder

    save_folder(program, folder.model, tokenizer=job.tokenizer)


def _write_card(outcomes: Sequence[Outcome], last: Sequence[Outcome], folder: PipelineFolder) -> None:
    """The saved model's card again, with the figures that its last outcomes found after it was saved."""
    from mxfx.export.folder import write_card

    outcome, names = last[0], {one.name for one in last}
    if found := [row for row in domain_rows(outcomes) if row.name in names]:
        write_card(outcome.result.portable, folder.model, card_table(found, outcome.bits_per_weight))


def document(outcomes: Sequence[Outcome], options: RunOptions, clock: Clock) -> dict[str, object]:
    """``results.json``: versions, machine, where the time went until now, and for each pipeline its figures, passes,
    coverage, evaluation.
    """
    figures = {row.name: row for row in rows(outcomes)}
    of_domains = ratios(outcomes)
    return {
        "mxfx": version("mxfx"),
        "versions": {name: version(name) for name in ("torch", "transformers", "lm-eval")},
        "machine": {"platform": platform.platform(), "device": options.device, "cores": os.cpu_count()},
        "time": {name: vars(spent) for name, spent in clock.parts.items()},
        "configs": [
            {**_as_json(outcome, figures[outcome.name]), "ratios": of_domains[outcome.name]} for outcome in outcomes
        ],
    }


def _as_json(outcome: Outcome, row: Row) -> dict[str, object]:
    steps = outcome.result.steps
    return {
        "name": outcome.name,
        **({"phase": outcome.phase} if outcome.phase else {}),
        "file": outcome.file,
        "baseline": outcome.baseline,
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
