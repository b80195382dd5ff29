"""What ``import mxfx`` gives: trace, load_pipeline, check, compile, run, load, as_causal_lm."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from mxfx.calibration.datasets import TokenSet, load_tokens
from mxfx.compat import load_any
from mxfx.config import ConfigError, Pipeline, Place, apply_overrides, check_order, to_toml
from mxfx.config.overrides import NoSuchPass
from mxfx.driver.pretrained import load_meta_model, load_model, load_tokenizer
from mxfx.evaluation.evaluate import evaluate
from mxfx.evaluation.results import EvalResult, ratio_with_stderr
from mxfx.graph.module import build
from mxfx.graph.program import Program
from mxfx.graph.tiny import FAMILIES
from mxfx.graph.trace import bind, trace
from mxfx.ground.errors import MxfxError
from mxfx.ground.files import write_file
from mxfx.ground.progress import track
from mxfx.passes import Annotate
from mxfx.pipeline.bisect import Culprit, bisect
from mxfx.pipeline.instruments import Dump, Ledger, Numbers, Reproduce, Timing, Verify
from mxfx.pipeline.manager import Instrument, PassManager, PipelineResult
from mxfx.pipeline.opt import load_source, opt, read_passes
from mxfx.pipeline.probe import Probe, vocabulary
from mxfx.report.html import page
from mxfx.report.results import coverage_json, pass_json
from mxfx.report.table import Row
from mxfx.report.weight_history import FILE as WEIGHT_HISTORY
from mxfx.report.weight_history import History
from mxfx.rewrite import Context, MissingCalibration
from mxfx.rewrite.size import bits_per_weight
from mxfx.runtime.causal_lm import as_causal_lm


def load_pipeline(path: str | Path) -> Pipeline:
    """Read a pipeline file or one in the tutorial's dialect. Raises ``ConfigError``."""
    return load_any(path)


def compile(
    model: nn.Module,
    pipeline: Pipeline | Iterable,
    *,
    tokens: Tensor | Callable[[], Tensor] | None = None,
    device: torch.device | str | None = None,
    instruments: Sequence[Instrument] = (),
) -> fx.GraphModule:
    """One call: trace, run the pipeline with its raise and emit stages, build.

    ``tokens`` are calibration ids, int64 ``(samples, length)``, or a function that gives them. The result is called as
    ``gm(input_ids, position_ids=None, attention_mask=None)``; it has ``.program`` (before the emit stage)
    and ``.report`` (the account of every pass). The model given is not changed.

    Raises ``ConfigError``, ``PassError`` or what an instrument raises.
    """
    place = torch.device(device) if device is not None else next(model.parameters()).device
    pipeline = pipeline if isinstance(pipeline, Pipeline) else Pipeline(pipeline)
    pipeline = pipeline.completed().emitted(place.type)
    ctx = Context(seed=pipeline.calibration.seed, device=place, progress=track)
    if tokens is not None:
        ctx.tokens = tokens if callable(tokens) else lambda: tokens
    result = PassManager(instruments).run(trace(model), pipeline, ctx)
    module = build(result.program).to(place)
    vars(module).update(program=result.before_emit, report=result)
    return module


@dataclass(frozen=True)
class Checked:
    """What ``check`` found out without weights: the annotated meta program, and how long the trace took."""

    pipeline: Pipeline
    program: Program
    annotated: Program
    trace_seconds: float


def check(pipeline: Pipeline, *, trust_remote_code: bool = False) -> Checked:
    """Everything that can be checked without weights.

    Options and facts, and the rules against the graph traced on the meta device. Raises ``ConfigError``, which cites
    the line.
    """
    passes = pipeline.passes
    name = pipeline.model_source()
    check_order(pipeline)
    started = time.perf_counter()
    settings = pipeline.model
    model = load_meta_model(name, settings.dtype, revision=settings.revision, trust_remote_code=trust_remote_code)
    program = trace(model, name=str(name))
    seconds = time.perf_counter() - started
    last = max((i for i, p in enumerate(passes) if isinstance(p, Annotate)), default=-1)
    head = pipeline.replace(specs=pipeline.specs[: last + 1])
    annotated = PassManager().run(program, head).program if last >= 0 else program
    return Checked(pipeline, program, annotated, seconds)


@dataclass
class RunOptions:
    """What the command line adds to a pipeline file.

    ``eval_data`` is a local file or folder of documents; without it lm-eval's ``wikitext`` comes from the hub.
    ``limit_tokens`` bounds the evaluated text. ``out`` owns the run: results, emitted models, dumps.
    """

    model: str | None = None
    data: str | None = None
    eval: str | None = None
    eval_data: str | None = None
    limit_tokens: int | None = None
    batch_size: int = 1
    out: Path | None = None
    device: str = "cpu"
    overrides: tuple[str, ...] = ()
    strict: bool = False
    save: bool = True
    float_row: bool = True
    trust_remote_code: bool = False
    say: Callable[[str], None] = field(default=lambda line: None)


@dataclass(frozen=True)
class Outcome:
    """One pipeline's run: what each pass did, and what the emitted model scores."""

    name: str
    file: str
    pipeline: Pipeline
    result: PipelineResult | None
    evaluation: EvalResult | None
    bits_per_weight: float
    compile_seconds: float
    baseline: str
    """Name of the float model's outcome that this one is compared with."""
    model_note: str = ""


@dataclass(frozen=True)
class RunSummary:
    """All rows of a run: the float model first, then each pipeline."""

    outcomes: tuple[Outcome, ...]
    rows: tuple[Row, ...]
    warnings: tuple[str, ...]
    out: Path | None


def prepare(files: Sequence[str | Path], options: RunOptions) -> list[tuple[str, Pipeline]]:
    """Read and check every pipeline, command line applied. Raises ``ConfigError``; no weight is read."""
    found: dict[str, Pipeline] = {}
    for file in files:
        name = Path(file).stem
        if name in found:
            raise ConfigError(_command_line(), f"two pipelines are called {name!r}", "files with different names")
        found[name] = load_any(file)
    # Settings first: they decide the emit stage, whose options an assignment may set.
    of_passes = [text for text in _assignments(options) if text.startswith("pass")]
    for assignment in _assignments(options):
        if assignment not in of_passes:
            _override(found, assignment)
    for name, pipeline in found.items():
        found[name] = pipeline.emitted(torch.device(options.device).type)
    for assignment in of_passes:
        _override(found, assignment)
    for pipeline in found.values():
        check_order(pipeline)
        _ = pipeline.passes
    return list(found.items())


def _override(pipelines: dict[str, Pipeline], assignment: str) -> None:
    """Apply one assignment to every pipeline that has the pass it names; one that none has is an error."""
    missing: list[NoSuchPass] = []
    for name, pipeline in pipelines.items():
        try:
            pipelines[name] = apply_overrides(pipeline, [assignment])
        except NoSuchPass as error:
            missing.append(error)
    if len(missing) == len(pipelines):
        raise missing[0]


def run(files: Sequence[str | Path], options: RunOptions) -> RunSummary:
    """The whole job: check, trace, rewrite, evaluate, write (design §8). See ``RunOptions``.

    Raises ``ConfigError`` before weights are read, ``PassError`` and what instruments raise after.
    """
    pipelines = prepare(files, options)
    outcomes: list[Outcome] = []
    loaded: dict[tuple[str, str], _Loaded] = {}
    for file, (name, pipeline) in zip(files, pipelines, strict=True):
        checked = check(pipeline, trust_remote_code=options.trust_remote_code)
        key = (str(pipeline.model_source()), pipeline.model.dtype)
        if key not in loaded:
            options.say(f"loading {key[0]} in {key[1]}")
            loaded[key] = _load(pipeline, checked, options)
            if options.float_row:
                # A run over several models or precisions has a float row for each.
                float_name = "float" if len(loaded) == 1 else f"float {Path(key[0]).name} {key[1]}"
                loaded[key].baseline = float_name
                outcomes.append(_float_outcome(float_name, loaded[key], options))
        outcomes.append(_run_one(name, str(file), pipeline, loaded[key], options))
        _write_results(outcomes, options)
    rows = tuple(_rows(outcomes))
    warnings = tuple(
        f"{o.name}: {step.pass_.name}: {w}"
        for o in outcomes
        if o.result
        for step in o.result.steps
        for w in step.record.warnings
    )
    return RunSummary(tuple(outcomes), rows, warnings, options.out)


def load(folder: str | Path) -> Program:
    """A saved run, back as it was, bit for bit: ``as_causal_lm(load(DIR))``. Raises ``ArtefactError``."""
    from mxfx.export.artefact import load as load_artefact

    return load_artefact(model_folder(folder))


def model_folder(folder: str | Path) -> Path:
    """The emitted model's folder in a run directory: the folder itself, ``DIR/model``, or the only ``DIR/*/model``."""
    folder = Path(folder)
    inside = [folder / "model", *sorted(folder.glob("*/model"))]
    found = [path for path in inside if path.is_dir()]
    if len(found) > 1:
        names = ", ".join(str(path.parent) for path in found)
        raise ValueError(f"{folder} holds several emitted models; name one: {names}")
    return found[0] if found else folder


def write_report(folder: str | Path) -> Path:
    """Make ``report.html`` from what a run left in its directory. Raises ``ValueError`` for a folder that is none."""
    folder = Path(folder)
    if not (folder / "results.json").is_file():
        raise NoRun(f"{folder} has no results.json; give the folder that `mxfx run --out` wrote")
    _write_text(folder / "report.html", page(folder))
    return folder / "report.html"


class NoRun(MxfxError, ValueError):
    """A folder is not what a run leaves."""


def run_folder(folder: str | Path) -> Path:
    """The folder of one pipeline inside a run directory: itself, or the only one in it. Raises ``NoRun``."""
    folder = Path(folder)
    found = [
        path.parent for path in (folder / "pipeline.toml", *sorted(folder.glob("*/pipeline.toml"))) if path.is_file()
    ]
    if not found:
        raise NoRun(f"{folder} holds no pipeline.toml; give the folder that `mxfx run --out` wrote")
    if len(found) > 1 and found[0] != folder:
        raise NoRun(f"{folder} holds several pipelines; name one: {', '.join(map(str, found))}")
    return found[0]


def find_culprit(target: str | Path, options: RunOptions, max_kl: float = 0.05) -> Culprit:
    """Which pass, and which match in it, takes KL over ``max_kl`` nats: of a run directory, or of a pipeline file.

    Raises ``NothingFound`` if none does, ``ConfigError`` and ``NoRun``.
    """
    file = run_folder(target) / "pipeline.toml" if Path(target).is_dir() else target
    ((_, pipeline),) = prepare([file], options)
    checked = check(pipeline, trust_remote_code=options.trust_remote_code)
    loaded = _load(pipeline, checked, options)
    ctx = Context(
        seed=pipeline.calibration.seed,
        device=torch.device(options.device),
        tokens=lambda: _tokens(pipeline, loaded).ids,
        progress=track,
    )
    source = str(pipeline.model_source())
    return bisect(loaded.program, pipeline, ctx, max_kl=max_kl, probe=_probe(pipeline, loaded), source=source)


#: Calibration of a built-in model: it has no tokenizer that text could pass.
_TINY_TOKENS = (4, 64)


def optimize(source: str | Path, passes: str | Path | Pipeline, *, dtype: str = "float32", **prints: Any) -> str:
    """``mxfx opt``: see ``mxfx.pipeline.opt.opt``, which takes ``prints``; calibration data are found for the source.

    A model's tokenizer reads the pipeline's ``calibration.dataset``; a built-in tiny model is calibrated with random
    ids; a printed graph has no tokenizer.
    """
    pipeline = read_passes(passes)
    program = _opt_program(source, pipeline, dtype)
    ctx = Context(seed=pipeline.calibration.seed, tokens=lambda: _opt_tokens(source, program, pipeline))
    return opt(program, pipeline, ctx=ctx, **prints)


def _opt_program(source: str | Path, pipeline: Pipeline, dtype: str) -> Program:
    is_hub_id = str(source).count("/") == 1 and not Path(source).exists() and not str(source).startswith(".")
    if is_hub_id:
        return trace(load_model(source, dtype, revision=pipeline.model.revision), name=str(source))
    return load_source(source, dtype=getattr(torch, dtype))


def _opt_tokens(source: str | Path, program: Program, pipeline: Pipeline) -> Tensor:
    calibration = pipeline.calibration
    if str(source) in FAMILIES:
        generator = torch.Generator().manual_seed(calibration.seed)
        return torch.randint(vocabulary(program), _TINY_TOKENS, generator=generator)
    if calibration.dataset is None or Path(source).is_file():
        raise MissingCalibration(
            "a pass needs calibration data: give a model (not a printed graph), "
            "and calibration{dataset=…} among the passes"
        )
    return _tokens(pipeline, _Loaded(program, load_tokenizer(source))).ids


@dataclass
class _Loaded:
    program: Program
    tokenizer: Any
    token_sets: dict[tuple, TokenSet] = field(default_factory=dict)
    baseline: str = ""


def _load(pipeline: Pipeline, checked: Checked, options: RunOptions) -> _Loaded:
    name = pipeline.model_source()
    revision, trust = pipeline.model.revision, options.trust_remote_code
    model = load_model(name, pipeline.model.dtype, revision=revision, trust_remote_code=trust)
    tokenizer = load_tokenizer(name, revision=revision, trust_remote_code=trust)
    program = bind(checked.program, model.to(options.device))
    return _Loaded(program, tokenizer)


def _float_outcome(name: str, loaded: _Loaded, options: RunOptions) -> Outcome:
    raised = Pipeline([]).completed().emitted(torch.device(options.device).type)
    result = PassManager().run(loaded.program, raised, Context(device=torch.device(options.device)))
    options.say("evaluating the float model") if options.eval else None
    evaluation = _evaluate(result.program, loaded, options)
    bits, note = bits_per_weight(result.before_emit), _note(result.program)
    return Outcome(name, "", raised, None, evaluation, bits, 0.0, name, note)


def _run_one(name: str, file: str, pipeline: Pipeline, loaded: _Loaded, options: RunOptions) -> Outcome:
    folder = None if options.out is None else options.out / name
    options.say(f"running {name}: {len(pipeline.specs)} passes")
    ctx = Context(
        seed=pipeline.calibration.seed,
        device=torch.device(options.device),
        tokens=lambda: _tokens(pipeline, loaded).ids,
        cache=None if folder is None else folder / "cache",
        strict=options.strict,
        progress=track,
    )
    if folder is not None:
        _write_text(folder / "pipeline.toml", to_toml(pipeline))
    started = time.perf_counter()
    manager = PassManager(default_instruments(folder, pipeline))
    result = manager.run(loaded.program, pipeline, ctx, probe=_probe(pipeline, loaded))
    seconds = time.perf_counter() - started
    if folder is not None:
        history = History.of(loaded.program, result.program).to_json()
        _write_text(folder / WEIGHT_HISTORY, json.dumps(history, indent=1) + "\n")
        if options.save:
            _save(result.program, loaded.tokenizer, folder / "model")
    options.say(f"evaluating {name}") if options.eval else None
    evaluation = _evaluate(result.program, loaded, options)
    bits, note = bits_per_weight(result.before_emit), _note(result.program)
    return Outcome(name, file, pipeline, result, evaluation, bits, seconds, loaded.baseline, note)


def _note(program: Program) -> str:
    """What a model's own config says of its weights (the demo's: that they were dequantized from 4 bits)."""
    return str(program.source.config.get("mxfx_note", ""))


def default_instruments(folder: Path | None, pipeline: Pipeline) -> list[Instrument]:
    """What stands around the passes of every run; dumps and reproducers need a ``folder`` to go to."""
    kept: list[Instrument] = [] if folder is None else [Dump(folder / "ir"), Reproduce(folder / "repro")]
    return [*kept, Ledger(pipeline.budget), Numbers(), Verify(), Timing()]


#: Real text as probe, where the pipeline names some: what a model does with random ids says little of its loss.
_PROBE_SHAPE = (2, 64)


def _probe(pipeline: Pipeline, loaded: _Loaded) -> Probe:
    samples, length = _PROBE_SHAPE
    if pipeline.calibration.dataset is None:
        return Probe(seed=pipeline.calibration.seed)
    return Probe(seed=pipeline.calibration.seed, ids=_tokens(pipeline, loaded).ids[:samples, :length])


def _tokens(pipeline: Pipeline, loaded: _Loaded) -> TokenSet:
    calibration = pipeline.calibration
    source = calibration.dataset or "wikitext2"
    key = (source, calibration.samples, calibration.length, calibration.seed)
    if key not in loaded.token_sets:
        loaded.token_sets[key] = load_tokens(
            source, loaded.tokenizer, samples=calibration.samples, length=calibration.length, seed=calibration.seed
        )
    return loaded.token_sets[key]


def _evaluate(program: Program, loaded: _Loaded, options: RunOptions) -> EvalResult | None:
    if options.eval is None:
        return None
    return evaluate(
        as_causal_lm(program, options.device),
        loaded.tokenizer,
        task=options.eval,
        eval_data=options.eval_data,
        limit_tokens=options.limit_tokens,
        batch_size=options.batch_size,
        device=options.device,
    )


def _save(program: Program, tokenizer: Any, folder: Path) -> None:
    from mxfx.export.artefact import save

    save(program, folder)
    tokenizer.save_pretrained(folder / "tokenizer")


def _rows(outcomes: Sequence[Outcome]) -> list[Row]:
    rows = []
    evaluations = {outcome.name: outcome.evaluation for outcome in outcomes}
    for outcome in outcomes:
        evaluation = outcome.evaluation
        baseline = evaluations.get(outcome.baseline)
        row = {
            "name": outcome.name,
            "bits_per_weight": outcome.bits_per_weight,
            "compile_seconds": outcome.compile_seconds,
        }
        if evaluation is not None:
            row |= {
                "word_perplexity": evaluation.word_perplexity,
                "token_perplexity": evaluation.token_perplexity,
                "eval_seconds": evaluation.seconds,
            }
        if evaluation is not None and baseline is not None:
            ratio = ratio_with_stderr(evaluation, baseline)
            row |= {
                "ratio": ratio.ratio,
                "ratio_stderr": ratio.stderr,
                "token_ratio": evaluation.token_perplexity / baseline.token_perplexity,
            }
        rows.append(Row(**row))
    return rows


def _write_results(outcomes: Sequence[Outcome], options: RunOptions) -> None:
    if options.out is None:
        return
    rows = {row.name: row for row in _rows(outcomes)}
    document = {
        "mxfx": metadata.version("mxfx"),
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "lm-eval")},
        "machine": {"platform": platform.platform(), "device": options.device, "cores": os.cpu_count()},
        "configs": [_as_json(outcome, rows[outcome.name]) for outcome in outcomes],
    }
    _write_text(options.out / "results.json", json.dumps(document, indent=2, default=str) + "\n")
    write_report(options.out)


def _as_json(outcome: Outcome, row: Row) -> dict[str, Any]:
    steps = [] if outcome.result is None else outcome.result.steps
    return {
        "name": outcome.name,
        "file": outcome.file,
        "model_note": outcome.model_note,
        "figures": vars(row),
        "passes": [pass_json(step) for step in steps],
        "coverage": None if not steps or outcome.result is None else coverage_json(outcome.result),
        "evaluation": None if outcome.evaluation is None else outcome.evaluation.to_json(),
    }


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, text.encode())


def _assignments(options: RunOptions) -> list[str]:
    given = []
    if options.model is not None:
        given.append(f"model.name={json.dumps(options.model)}")
    if options.data is not None:
        given.append(f"calibration.dataset={json.dumps(options.data)}")
    return [*given, *options.overrides]


def _command_line() -> Place:
    return Place("command line")
