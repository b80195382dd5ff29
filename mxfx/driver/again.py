"""``mxfx eval``: emitted models evaluated again, from their files, beside the float model that they were made of."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from mxfx.config import ConfigError, Pipeline, Place, load
from mxfx.config.pipeline import ModelConfig
from mxfx.driver.fitting import fit
from mxfx.driver.measure import FloatModel, FloatModels, Measured, Summary, measured
from mxfx.driver.options import RunOptions
from mxfx.driver.pretrained import ModelError, load_tokenizer
from mxfx.driver.rescored import record, results_of
from mxfx.driver.run_directory import PipelineFolder, RunDirectory, RunError, find_model, is_reserved
from mxfx.evaluation.results import EvaluationError
from mxfx.evaluation.suite import Suite
from mxfx.evaluation.wanted import CHAT, Wanted, kind
from mxfx.export.artefact import Opened
from mxfx.graph.phases import entries
from mxfx.graph.program import Program
from mxfx.ground import ranks
from mxfx.ground.phases import PHASES
from mxfx.pipeline.emit import emitted
from mxfx.report.weight_history import FILE, History
from mxfx.rewrite.size import bits_per_weight
from mxfx.runtime.causal_lm import as_causal_lm
from mxfx.runtime.stepwise import Stepwise

#: What ``--float`` says for no float model.
NONE = "none"
_MODEL = "give it with --float MODEL"
_REMEDY = f"{_MODEL}, or --float {NONE} to measure without one"


@dataclass(frozen=True)
class Saved:
    """An emitted model: its folder, its name in tables, and what the run left that made it (None: no run's files)."""

    folder: Path
    name: str
    run: PipelineFolder | None

    @classmethod
    def at(cls, given: str | Path) -> Saved:
        """Of OUT, OUT/NAME or OUT/NAME/model, or of a folder that no run wrote. Raises ``NoRun``."""
        folder = find_model(given)
        home = PipelineFolder(folder.resolve().parent)
        if folder.resolve() == home.model and home.pipeline.is_file():
            return cls(folder, home.path.name, home)
        return cls(folder, str(folder.resolve()) if is_reserved(str(given)) else str(given), None)


class _Planned(NamedTuple):
    """A model, what it is compared with, whether that is what it was made of, and warnings about that."""

    saved: Saved
    floating: FloatModel | None
    own: bool
    warnings: tuple[str, ...]


def evaluate_saved(
    folders: Sequence[str | Path],
    options: RunOptions,
    *,
    phase: str = "prefill",
    float_model: str | None = None,
    write: bool = True,
) -> Summary:
    """Emitted models evaluated again, from their files, all beside one pass of each float model over the text.

    ``phase`` is ``prefill``, where whole windows are read, or ``decode``: one token a step, through the cache.
    ``float_model`` is a name or folder; None: what the ``pipeline.toml`` of each run names; ``none``: none, and there
    is perplexity alone. With ``write`` what is found stands in the files of the runs afterwards, as ``run`` writes it.

    Raises ``ConfigError``, ``NoRun``, ``RunError``, ``ModelError``, ``ArtefactError``, ``EvaluationError``; the last
    also where the float model is not the one that a model was made of.
    """
    options.check()
    if phase not in PHASES:
        raise ConfigError(Place("--phase"), f"unknown phase {phase!r}", " or ".join(PHASES))
    wanted = options.wanted()
    if wanted is None:
        raise EvaluationError("nothing to evaluate was named; expected wikitext, files, chat, or tasks of lm-eval")
    models = _named([Saved.at(folder) for folder in folders], folders)
    for saved in models:
        Opened.of(saved.folder)
        if CHAT in map(kind, wanted.names) and (float_model == NONE or (float_model is None and saved.run is None)):
            raise EvaluationError(f"--eval chat reads the float model's answers, and {saved.folder} has none: {_MODEL}")
    floats = FloatModels(options)
    found: dict[str, Measured] = {}
    with ExitStack() as stack:
        directories: dict[Path, RunDirectory] = {}
        if write and ranks.is_first():
            directories = {root: stack.enter_context(RunDirectory(root)) for root in _roots(models)}
        for directory in directories.values():
            results_of(directory)
        plans = [_planned(saved, floats, options, float_model) for saved in models]
        for plan in plans:
            saved, floating = plan.saved, plan.floating
            program = Opened.of(saved.folder).program()
            if floating is not None:
                _check_sizes(saved, floating, program)
                if floating.baseline not in found:
                    found[floating.baseline] = _float_measured(floating, options)
            options.say(f"evaluating {saved.name}")
            one = found[saved.name] = _measured(plan, program, phase, wanted, options)
            if not (write and ranks.is_first()):
                continue
            if floating is None or not plan.own:
                options.say(f"{saved.name}: nothing is written, for these figures are not beside its own float model")
                continue
            directory = None if saved.run is None else directories[saved.run.path.parent]
            for told in record(directory, saved, program, one, found[floating.baseline], phase, options):
                options.say(f"{saved.name}: {told}")
    return Summary.of(list(found.values()))


def _named(models: list[Saved], folders: Sequence[str | Path]) -> list[Saved]:
    """Under names of their own: where two runs have a pipeline of one name, the folders that were given."""
    if len({saved.name for saved in models}) == len(models):
        return models
    if len({saved.folder.resolve() for saved in models}) < len(models):
        raise EvaluationError(f"one model is named twice: {', '.join(map(str, folders))}")
    return [Saved(saved.folder, str(given), saved.run) for saved, given in zip(models, folders, strict=True)]


def _roots(models: Sequence[Saved]) -> Iterator[Path]:
    """The run directories that are written to. Raises ``RunError`` for one that cannot be."""
    for root in dict.fromkeys(saved.run.path.parent for saved in models if saved.run is not None):
        if not os.access(root, os.W_OK):
            raise RunError(f"{root} cannot be written to; --no-write evaluates without")
        yield root


def _planned(saved: Saved, floats: FloatModels, options: RunOptions, named: str | None) -> _Planned:
    """Finds and loads a model's float model. Raises what ``FloatModels.of`` does for one that the user named."""
    if named == NONE:
        return _Planned(saved, None, False, ())
    if named is None and saved.run is None:
        told = f"no run's files lie beside {saved.folder}, so its float model is not known: {_REMEDY}"
        return _Planned(saved, None, False, (told,))
    if saved.run is not None:
        settings = load(saved.run.pipeline).model
    else:
        settings = ModelConfig(dtype=str(Opened.of(saved.folder).program().dtype).removeprefix("torch."))
    if named is not None:
        settings = ModelConfig(named, settings.dtype)
    try:
        floating = floats.of(Pipeline([], model=settings).completed())
    except (ConfigError, ModelError) as error:
        if named is not None:
            raise
        why = error.problem if isinstance(error, ConfigError) else error
        told = f"its float model {settings.name!r} is not there ({why}): {_REMEDY}"
        return _Planned(saved, None, False, (told,))
    mine, theirs = (tokens.get_vocab() for tokens in (_tokenizer(saved, options), floating.job.tokenizer))
    if mine != theirs:
        raise EvaluationError(
            f"{saved.folder} and {str(settings.name)!r} have different tokenizers, so it is not the float model that "
            f"the other was made of; {_REMEDY}"
        )
    if (other := _other_weight(saved, floating.job.program)) is None:
        return _Planned(saved, floating, True, ())
    problem = f"{str(settings.name)!r} is not the float model that {saved.folder} was made of: {other} differs"
    if named is None:
        raise EvaluationError(f"{problem}; {_REMEDY}")
    return _Planned(saved, floating, False, (f"{problem}; ratios, KL and agreement are to what --float names",))


def _other_weight(saved: Saved, program: Program) -> str | None:
    """A weight that had another hash before the first pass changed it; None if there is none, or no history."""
    if saved.run is None or not (saved.run.path / FILE).is_file():
        return None
    for name, (first, *_) in History.read(saved.run.path).by_weight().items():
        if first.before and (name not in program.weights or program.weights.hash(name) != first.before):
            return name
    return None


def _check_sizes(saved: Saved, floating: FloatModel, program: Program) -> None:
    """Raise ``EvaluationError`` for a float model of another kind or size, whose logits cannot be compared."""
    mine, theirs = program.source, floating.job.program.source
    if mine.architecture != theirs.architecture:
        raise EvaluationError(
            f"{theirs.name} is a {theirs.architecture}, {saved.folder} was made of a {mine.architecture}; expected the "
            f"float model that it was made of, {mine.name!r}"
        )
    of_float = theirs.config
    for key, size in program.source.config.items():
        counts = key.endswith("_size") or key.startswith("num_")
        if counts and isinstance(size, int) and of_float.get(key, size) != size:
            raise EvaluationError(
                f"{saved.folder} has {key} = {size}, the float model {of_float[key]}: they do not belong together; "
                f"{_REMEDY}"
            )


def _tokenizer(saved: Saved, options: RunOptions) -> object:
    return load_tokenizer(saved.folder, trust_remote_code=options.trust_remote_code)


def _float_measured(model: FloatModel, options: RunOptions) -> Measured:
    assert model.suite is not None and model.reference is not None
    options.say("evaluating the float model")
    warnings = [*model.job.warnings]
    evaluation = measured(model.reference.model, model.suite, model.reference, warnings)
    return Measured(
        name=model.baseline,
        evaluation=evaluation,
        bits_per_weight=bits_per_weight(model.job.program),
        baseline=model.baseline,
        warnings=tuple(warnings),
    )


def _measured(plan: _Planned, program: Program, phase: str, wanted: Wanted, options: RunOptions) -> Measured:
    device, warnings = torch.device(options.device), [*plan.warnings]
    if plan.floating is None:
        longest = program.source.config.get("max_position_embeddings")
        suite, reference = Suite(wanted, _tokenizer(plan.saved, options), longest), None
    else:
        assert plan.floating.suite is not None
        suite, reference = plan.floating.suite, plan.floating.reference
    ready = emitted(program, device)
    fitted = fit(ready, device, wanted.batch_size)
    if not fitted.whole:
        warnings.append(f"run in pieces, which is slow: the emitted model does not fit on {device} ({fitted})")
    lm = as_causal_lm(ready, device, whole=fitted.whole)
    evaluation = measured(Stepwise(lm) if phase == "decode" else lm, suite, reference, warnings)
    return Measured(
        name=plan.saved.name,
        evaluation=evaluation,
        bits_per_weight=bits_per_weight(entries(program).get(phase, program)),
        baseline="" if plan.floating is None else plan.floating.baseline,
        warnings=tuple(warnings),
    )
