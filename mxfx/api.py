"""What ``import mxfx`` gives: trace, load_pipeline, check, compile, run, load, as_causal_lm."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from mxfx.compat.prepare import prepare
from mxfx.compat.tutorial import load_any
from mxfx.config import Pipeline
from mxfx.driver import run as driver
from mxfx.driver.check import Checked, check
from mxfx.driver.job import Job, default_instruments
from mxfx.driver.options import RunOptions
from mxfx.driver.pretrained import load_model, load_tokenizer
from mxfx.driver.run import Named, Outcome, RunSummary
from mxfx.driver.run_directory import NoRun, find_model, find_pipeline, write_report
from mxfx.graph.module import build
from mxfx.graph.program import Program
from mxfx.graph.tiny import FAMILIES
from mxfx.graph.trace import trace
from mxfx.pipeline.bisect import Culprit, bisect
from mxfx.pipeline.manager import Instrument
from mxfx.pipeline.opt import load_source, opt, read_passes
from mxfx.pipeline.probe import vocabulary
from mxfx.rewrite import MissingCalibration
from mxfx.runtime.causal_lm import as_causal_lm

__all__ = [
    "Checked", "NoRun", "Outcome", "RunOptions", "RunSummary", "as_causal_lm", "check", "compile",
    "default_instruments", "find_culprit", "load", "load_pipeline", "load_tokenizer", "optimize", "prepare", "run",
    "trace", "write_report",
]  # fmt: skip


def load_pipeline(path: str | Path) -> Pipeline:
    """Read a pipeline file or one in the tutorial's dialect. Raises ``ConfigError``."""
    return load_any(path)


def compile(
    model: nn.Module,
    pipeline: Pipeline | Iterable,
    *,
    tokens: Tensor | Callable[[], Tensor] | None = None,
    device: torch.device | str | None = None,
    instruments: Sequence[Instrument] | None = None,
) -> fx.GraphModule:
    """One call: trace, run the pipeline with its raise and emit stages, build.

    ``tokens`` are calibration ids, int64 ``(samples, length)``, or a function that gives them. Every pass is held to
    its promise and the graph is verified, as in ``mxfx run``; ``instruments=()`` leaves that out. The result is called
    as ``gm(input_ids, position_ids=None, attention_mask=None)``; it has ``.program`` (before the emit stage) and
    ``.report`` (the account of every pass). The model given is not changed; what a pass warns of is warned of.

    Raises ``TypeError`` for a path as pipeline, ``ConfigError``, ``PassError`` or what an instrument raises.
    """
    if isinstance(pipeline, str | Path):
        raise TypeError(
            f"the pipeline is {str(pipeline)!r}; expected a Pipeline or passes: mxfx.load_pipeline reads a file"
        )
    place = torch.device(device) if device is not None else next(model.parameters()).device
    pipeline = pipeline if isinstance(pipeline, Pipeline) else Pipeline(pipeline)
    pipeline = pipeline.completed().emitted(place.type)
    given = tokens if tokens is None or callable(tokens) else lambda: tokens
    around = default_instruments(pipeline) if instruments is None else instruments
    result = Job.of_model(model, place, given).run(pipeline, around)
    for record in result.records:
        for warning in record.warnings:
            warnings.warn(f"{record.name}: {warning}", stacklevel=2)
    module = build(result.program).to(place)
    vars(module).update(program=result.before_emit, report=result)
    return module


def run(files: Sequence[str | Path], options: RunOptions) -> RunSummary:
    """The whole job: check, trace, rewrite, evaluate, write, prove (design §9). See ``RunOptions``.

    Raises ``ConfigError`` before weights are read, ``PassError`` and what instruments raise after.
    """
    options.check()
    prepared = prepare(files, options)
    pipelines = [Named(name, str(file), one) for file, (name, one) in zip(files, prepared, strict=True)]
    return driver.run(pipelines, options)


def load(folder: str | Path) -> Program:
    """A saved run, back as it was, bit for bit: ``as_causal_lm(load(DIR))``. Raises ``ArtefactError``, ``NoRun``."""
    from mxfx.export.artefact import load as load_artefact

    return load_artefact(find_model(folder))


def find_culprit(target: str | Path, options: RunOptions, max_kl: float = 0.05) -> Culprit:
    """Which pass, and which match in it, takes KL over ``max_kl`` nats: of a run directory, or of a pipeline file.

    Raises ``NothingFound`` if none does, ``ConfigError`` and ``NoRun``.
    """
    options.check()
    file = find_pipeline(target).pipeline if Path(target).is_dir() else target
    ((_, pipeline),) = prepare([file], options)
    trust = options.trust_remote_code
    checked = check(pipeline, trust_remote_code=trust)
    job = Job.load(pipeline, checked.program, options.device, trust_remote_code=trust)
    source = str(pipeline.model_source())
    ctx, probe = job.context(pipeline), job.probe(pipeline)
    return bisect(job.program, pipeline, ctx, max_kl=max_kl, probe=probe, source=source)


#: Calibration of a built-in model: it has no tokenizer that text could pass.
_TINY_TOKENS = (4, 64)


def optimize(
    source: str | Path | Program, passes: str | Path | Pipeline, *, dtype: str = "float32", **prints: Any
) -> str:
    """``mxfx opt``: see ``mxfx.pipeline.opt.opt``, which takes ``prints``; calibration data are found for the source.

    A model's tokenizer reads the pipeline's ``calibration.dataset``; a built-in tiny model is calibrated with random
    ids; a printed graph has no tokenizer.
    """
    pipeline = read_passes(passes)
    if isinstance(source, Program):
        return opt(source, pipeline, ctx=Job(source, torch.device("cpu")).context(pipeline), **prints)
    is_hub_id = str(source).count("/") == 1 and not Path(source).exists() and not str(source).startswith(".")
    if is_hub_id or (Path(source) / "config.json").is_file():
        program = trace(load_model(source, dtype, revision=pipeline.model.revision), name=str(source))
    else:
        program = load_source(source, dtype=getattr(torch, dtype))
    job = Job(program, torch.device("cpu"))
    job.given = lambda: _opt_tokens(source, job, pipeline)
    return opt(program, pipeline, ctx=job.context(pipeline), **prints)


def _opt_tokens(source: str | Path, job: Job, pipeline: Pipeline) -> Tensor:
    calibration = pipeline.calibration
    if str(source) in FAMILIES:
        generator = torch.Generator().manual_seed(calibration.seed)
        return torch.randint(vocabulary(job.program), _TINY_TOKENS, generator=generator)
    if calibration.dataset is None or Path(source).is_file():
        raise MissingCalibration(
            "a pass needs calibration data: give a model (not a printed graph), "
            "and calibration{dataset=…} among the passes"
        )
    job.tokenizer = job.tokenizer or load_tokenizer(source)
    return job.tokens(calibration)
