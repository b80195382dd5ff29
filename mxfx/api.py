"""What ``import mxfx`` gives: trace, load_pipeline, check, compile, run, load, as_causal_lm."""

from __future__ import annotations

import json
import os
import platform
import tempfile
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
from mxfx.graph.program import Program
from mxfx.graph.trace import bind, trace
from mxfx.passes import Annotate
from mxfx.pipeline import ConfigError, Pipeline, Place, apply_overrides, check_order, to_toml
from mxfx.pipeline.instruments import Numbers, Timing, Verify
from mxfx.pipeline.manager import Instrument, PassManager, PipelineResult
from mxfx.report.table import Row
from mxfx.rewrite import Context
from mxfx.rewrite.size import bits_per_weight
from mxfx.runtime.causal_lm import as_causal_lm, emit
from mxfx.runtime.evaluate import EvalResult, evaluate, ratio_with_stderr
from mxfx.runtime.pretrained import load_meta_model, load_model, load_tokenizer
from mxfx.runtime.progress import track


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
    """One call: trace, run the pipeline, lower, build.

    ``tokens`` are calibration ids, int64 ``(samples, length)``, or a function that gives them. The result is called as
    ``gm(input_ids, position_ids=None, attention_mask=None)`` and has ``.program`` (before lowering) and ``.report`` (the
    account of every pass). The model given is not changed.

    Raises ``ConfigError``, ``PassError`` or what an instrument raises.
    """
    pipeline = (pipeline if isinstance(pipeline, Pipeline) else Pipeline(pipeline)).completed()
    place = torch.device(device) if device is not None else next(model.parameters()).device
    ctx = Context(seed=pipeline.calibration.seed, device=place, progress=track)
    if tokens is not None:
        ctx.tokens = tokens if callable(tokens) else lambda: tokens
    result = PassManager(instruments).run(trace(model), pipeline, ctx)
    module = emit(result.program, place)
    vars(module).update(program=result.program, report=result)
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

    Options and facts, and the rules against the graph traced on the meta device. Raises ``ConfigError`` that cites the line.
    """
    passes = pipeline.passes
    name = pipeline.model_source()
    check_order(pipeline)
    started = time.perf_counter()
    program = trace(load_meta_model(name, pipeline.model.dtype, revision=pipeline.model.revision), name=str(name))
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
        pipeline = apply_overrides(load_any(file), _assignments(options))
        check_order(pipeline)
        _ = pipeline.passes
        found[name] = pipeline
    return list(found.items())


def run(files: Sequence[str | Path], options: RunOptions) -> RunSummary:
    """The whole job: check, trace, rewrite, evaluate, write (design §8). See ``RunOptions``.

    Raises ``ConfigError`` before weights are read, ``PassError`` and what instruments raise after.
    """
    pipelines = prepare(files, options)
    outcomes: list[Outcome] = []
    loaded: dict[tuple[str, str], _Loaded] = {}
    for name, pipeline in pipelines:
        checked = check(pipeline, trust_remote_code=options.trust_remote_code)
        key = (str(pipeline.model_source()), pipeline.model.dtype)
        if key not in loaded:
            options.say(f"loading {key[0]} in {key[1]}")
            loaded[key] = _load(pipeline, checked, options)
            if options.float_row:
                outcomes.append(_float_outcome(loaded[key], pipeline, options))
        outcomes.append(
            _run_one(
                name,
                str(dict(zip([n for n, _ in pipelines], files, strict=True))[name]),
                pipeline,
                loaded[key],
                options,
            )
        )
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
    """The emitted model's folder inside a run directory: the folder itself, ``DIR/model``, or the only ``DIR/*/model``."""
    folder = Path(folder)
    inside = [folder / "model", *sorted(folder.glob("*/model"))]
    found = [path for path in inside if path.is_dir()]
    if len(found) > 1:
        names = ", ".join(str(path.parent) for path in found)
        raise ValueError(f"{folder} holds several emitted models; name one: {names}")
    return found[0] if found else folder


@dataclass
class _Loaded:
    program: Program
    tokenizer: Any
    token_sets: dict[tuple, TokenSet] = field(default_factory=dict)


def _load(pipeline: Pipeline, checked: Checked, options: RunOptions) -> _Loaded:
    name = pipeline.model_source()
    revision, trust = pipeline.model.revision, options.trust_remote_code
    model = load_model(name, pipeline.model.dtype, revision=revision, trust_remote_code=trust)
    tokenizer = load_tokenizer(name, revision=revision, trust_remote_code=trust)
    program = bind(checked.program, model.to(options.device))
    return _Loaded(program, tokenizer)


def _float_outcome(loaded: _Loaded, pipeline: Pipeline, options: RunOptions) -> Outcome:
    raised = Pipeline([]).completed()
    program = PassManager().run(loaded.program, raised).program
    options.say("evaluating the float model") if options.eval else None
    return Outcome(
        "float", "", raised, None, _evaluate(program, loaded, options), bits_per_weight(program), 0.0, _note(program)
    )


def _run_one(name: str, file: str, pipeline: Pipeline, loaded: _Loaded, options: RunOptions) -> Outcome:
    folder = None if options.out is None else options.out / name
    options.say(f"running {name}: {len(pipeline.specs)} passes")
    ctx = Context(
        seed=pipeline.calibration.seed,
        device=torch.device(options.device),
        tokens=lambda: _tokens(pipeline, loaded).ids,
        cache=None if folder is None else folder / "cache",
        progress=track,
    )
    started = time.perf_counter()
    result = PassManager(_instruments(folder, pipeline)).run(loaded.program, pipeline, ctx)
    seconds = time.perf_counter() - started
    if folder is not None:
        _write_text(folder / "pipeline.toml", to_toml(pipeline))
        if options.save:
            _save(result.program, loaded.tokenizer, folder / "model")
    options.say(f"evaluating {name}") if options.eval else None
    evaluation = _evaluate(result.program, loaded, options)
    return Outcome(
        name, file, pipeline, result, evaluation, bits_per_weight(result.program), seconds, _note(result.program)
    )


def _note(program: Program) -> str:
    """What a model's own config says of its weights (the demo's: that they were dequantized from 4 bits)."""
    return str(program.source.config.get("mxfx_note", ""))


def _instruments(folder: Path | None, pipeline: Pipeline) -> list[Instrument]:
    return [Verify(), Numbers(), Timing()]


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
    baseline: EvalResult | None = None
    for outcome in outcomes:
        evaluation = outcome.evaluation
        if outcome.name == "float":
            baseline = evaluation
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


def _as_json(outcome: Outcome, row: Row) -> dict[str, Any]:
    steps = [] if outcome.result is None else outcome.result.steps
    return {
        "name": outcome.name,
        "file": outcome.file,
        "model_note": outcome.model_note,
        "figures": vars(row),
        "passes": [
            {
                "pass": step.pass_.name,
                "place": step.place,
                "matched": len(step.record.matches),
                "skipped": len(step.record.skips),
                "warnings": step.record.warnings,
                "details": step.record.details,
                "findings": step.findings,
            }
            for step in steps
        ],
        "evaluation": None if outcome.evaluation is None else outcome.evaluation.to_json(),
    }


def _write_text(path: Path, text: str) -> None:
    """Write a whole file or none of it: a temporary name in the same folder, flushed, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, prefix=f".{path.name}.", delete=False, encoding="utf-8"
    ) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)


def _assignments(options: RunOptions) -> list[str]:
    given = []
    if options.model is not None:
        given.append(f"model.name={json.dumps(options.model)}")
    if options.data is not None:
        given.append(f"calibration.dataset={json.dumps(options.data)}")
    return [*given, *options.overrides]


def _command_line() -> Place:
    return Place("command line")
