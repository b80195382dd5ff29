"""``mxfx eval``: an emitted model measured again from its files, alone or beside its float model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mxfx.config import ConfigError, Pipeline, Place
from mxfx.config.pipeline import ModelConfig
from mxfx.driver.fitting import fitting_lm
from mxfx.driver.options import RunOptions
from mxfx.driver.pretrained import load_tokenizer
from mxfx.driver.proof import inexact_told
from mxfx.driver.run import model_of
from mxfx.driver.run_directory import find_model
from mxfx.evaluation.results import EvaluationError
from mxfx.evaluation.suite import Evaluation, Suite
from mxfx.graph.phases import entries
from mxfx.graph.program import Program
from mxfx.ground.phases import PHASES
from mxfx.rewrite.size import bits_per_weight
from mxfx.runtime.stepwise import Stepwise


@dataclass(frozen=True)
class Again:
    """What was found; ``floats`` of the float model on the same text, None where none was named."""

    evaluation: Evaluation
    bits_per_weight: float
    floats: Evaluation | None
    warnings: tuple[str, ...]


def evaluate_saved(folder: str | Path, options: RunOptions, phase: str = "prefill") -> Again:
    """An emitted model evaluated again, from its files alone; with ``options.model`` beside that float model, for KL,
    agreement, ratios, and the domain ``chat``.

    ``phase`` is ``prefill``, where whole windows are read, or ``decode``: one token a step, through the cache.

    Raises ``ConfigError``, ``NoRun``, ``ArtefactError``, ``ModelError``, ``EvaluationError``.
    """
    from mxfx.export.artefact import load

    options.check()
    if phase not in PHASES:
        raise ConfigError(Place("--phase"), f"unknown phase {phase!r}", " or ".join(PHASES))
    wanted = options.wanted()
    if wanted is None:
        raise EvaluationError("nothing to evaluate was named; expected wikitext, files, or tasks of lm-eval")
    saved = find_model(folder)
    program = load(saved)
    device = torch.device(options.device)
    warnings: list[str] = []
    floats = None
    if options.model is None:
        tokenizer = load_tokenizer(saved, trust_remote_code=options.trust_remote_code)
        suite: Suite | None = Suite(wanted, tokenizer, program.source.config.get("max_position_embeddings"))
        reference = None
    else:
        dtype = str(program.dtype).removeprefix("torch.")
        beside = Pipeline([], model=ModelConfig(options.model, dtype)).completed()
        made = model_of(beside, {}, [], replace(options, float_row=False))
        _check_alike(program, made.job.program, folder, options.model)
        suite, reference = made.suite, made.reference
        assert suite is not None and reference is not None
        warnings += made.job.warnings
        floats = suite.run(reference.model, reference)
    assert suite is not None
    model = fitting_lm(program, device, wanted.batch_size)
    with inexact_told(warnings):
        found = suite.run(Stepwise(model) if phase == "decode" else model, reference)
    bits = bits_per_weight(entries(program).get(phase, program))
    return Again(found, bits, floats, tuple(warnings))


def _check_alike(program: Program, other: Program, folder: str | Path, name: str) -> None:
    """Raise ``EvaluationError`` for a float model whose logits are of other tokens."""
    mine, theirs = (one.source.config.get("vocab_size") for one in (program, other))
    if mine != theirs or program.source.architecture != other.source.architecture:
        raise EvaluationError(
            f"--model {name} is a {other.source.architecture} of {theirs} tokens, {folder} was made of a "
            f"{program.source.architecture} of {mine}; expected the float model that it was made of, "
            f"{program.source.name!r}"
        )
