"""What ``mxfx eval`` found, in the files that a run left: scores, ``results.json``, its page, the model's card."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mxfx.driver.measure import Measured, domain_rows, ratios, rows
from mxfx.driver.options import RunOptions
from mxfx.driver.run_directory import RESULTS, NoRun, RunDirectory
from mxfx.evaluation.results import EvalResult
from mxfx.evaluation.suite import Evaluation
from mxfx.graph.program import Program
from mxfx.ground.files import DamagedFile, read_json
from mxfx.ground.versions import version
from mxfx.report.table import card_table

if TYPE_CHECKING:
    from mxfx.driver.again import Saved

#: Figures of a row that come from the main text; the others stay as the run found them.
_OF_TEXT = ("word_perplexity", "ratio", "ratio_stderr", "token_perplexity", "token_ratio")


def results_of(directory: RunDirectory) -> dict[str, Any]:
    """What a run found; of one without results an empty document. Raises ``NoRun`` for damaged results."""
    path = directory.root / RESULTS
    try:
        document = read_json(path) if path.is_file() else {"configs": []}
        if all(isinstance(config["name"], str) for config in document["configs"]):
            return document
        raise TypeError("a name is none")
    except (DamagedFile, KeyError, TypeError) as error:
        what = error if isinstance(error, DamagedFile) else f"{path} is damaged ({type(error).__name__}: {error})"
        raise NoRun(f"{what}: run the pipelines again, or give --no-write to measure without writing") from error


def record(
    directory: RunDirectory | None,
    saved: Saved,
    program: Program,
    found: Measured,
    beside: Measured,
    phase: str,
    options: RunOptions,
) -> list[str]:
    """Write them, and give what is to be told of it. Without a run (``directory`` None) there are scores alone.

    A text of the run that was read again has the new figures. Another text of the same name, as one with another limit
    is, stands beside it under a name with its size, for the run's other pipelines were measured on the first.

    Raises ``NoRun`` for damaged results.
    """
    home = saved.folder if saved.run is None else saved.run.path
    scores = home / "decode" if phase == "decode" else home
    document = {"configs": []} if directory is None else results_of(directory)
    if directory is None or all(config["name"] != home.name for config in document["configs"]):
        _kept(found.evaluation).write(scores, keep=True)
        return [f"scores are in {scores}"]
    try:
        config = _config(document["configs"], home.name, phase)
        of_float = _float_config(document["configs"], config, beside.name)
        names = _names(document["configs"], config, of_float, _kept(beside.evaluation))
        here, there = (_renamed(one, names) for one in (found, beside))
        _kept(here.evaluation).write(scores, keep=True)
        _enter(config, of_float, here, there, options)
        directory.write_results(document)
        if phase == "prefill" and of_float is not None:
            _write_card(saved.folder, program, document["configs"], config, of_float)
    except (KeyError, TypeError, AttributeError) as error:
        raise NoRun(
            f"{directory.root / RESULTS} is damaged ({type(error).__name__}: {error}): run the pipelines again"
        ) from error
    others = [(name, new) for name, new in names.items() if name != new]
    told = [f"the run has read another text as {name}: this one is called {new!r} there" for name, new in others]
    return [*told, f"written to {directory.root}"]


def _enter(
    config: dict[str, Any], of_float: dict[str, Any] | None, here: Measured, there: Measured, options: RunOptions
) -> None:
    """The figures of a model and its float model into their entries."""
    entries = [(config, here)] if of_float is None else [(of_float, there), (config, here)]
    for entry, one in entries:
        _merge(entry, one, options)
    config["ratios"] = {**config.get("ratios", {}), **ratios([there, here])[here.name]}
    # The table of results is of one text.
    main = next(iter(entries[0][0]["evaluation"]["domains"]), None)
    for entry, one in entries:
        if main in _kept(one.evaluation).domains:
            row = rows([_only(there, main), _only(one, main)])[-1]
            entry["figures"] |= {name: getattr(row, name) for name in _OF_TEXT}


def _kept(evaluation: Evaluation | None) -> Evaluation:
    assert evaluation is not None
    return evaluation


def _config(configs: list[dict[str, Any]], name: str, phase: str) -> dict[str, Any]:
    """The entry of a pipeline; of its steps one is made, where the run had none."""
    of_name = {config["name"]: config for config in configs}
    called = f"{name} decode" if phase == "decode" else name
    if called not in of_name:
        base = of_name[name]
        made = base | {"name": called, "phase": phase, "warnings": [], "passes": [], "time": None, "coverage": None}
        made |= {"figures": {**base["figures"], **dict.fromkeys(_OF_TEXT), "name": called}, "evaluation": None}
        made |= {"ratios": {}, "linears": []}
        configs.insert(configs.index(base) + 1, made)
        of_name[called] = made
    if phase == "decode":
        of_name[called]["model_note"] = f"{called}: one token a step, through the cache"
    return of_name[called]


def _float_config(configs: list[dict[str, Any]], config: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """The entry of the float model; None in a run that wrote none."""
    floats = {one["name"]: one for one in configs if not one["file"]}
    if (known := config.get("baseline", name)) in floats:
        return floats[known]
    return next(iter(floats.values())) if len(floats) == 1 else None


def _names(
    configs: list[dict[str, Any]], config: Mapping[str, Any], of_float: Mapping[str, Any] | None, new: Evaluation
) -> dict[str, str]:
    """The name of each new text in the results: its own, unless another text there has it."""
    same_float = [one for one in configs if one.get("baseline") == config.get("baseline") or one is of_float]
    held: dict[str, set[tuple[str, int]]] = {}
    for one in same_float:
        for name, result in ((one["evaluation"] or {}).get("domains") or {}).items():
            held.setdefault(name, set()).add((result["text_sha"], result["max_length"]))
    return {
        name: name
        if held.get(name, set()) <= {(result.text_sha, result.max_length)}
        else f"{name} ({result.tokens:,} tokens, {result.text_sha[:6]})"
        for name, result in new.domains.items()
    }


def _renamed(one: Measured, names: Mapping[str, str]) -> Measured:
    found = _kept(one.evaluation)
    domains = {names[name]: dataclasses.replace(of, task=names[name]) for name, of in found.domains.items()}
    return dataclasses.replace(one, evaluation=Evaluation(domains, found.tasks))


def _only(one: Measured, main: str) -> Measured:
    return dataclasses.replace(one, evaluation=Evaluation({main: _kept(one.evaluation).domains[main]}, {}))


def _merge(config: dict[str, Any], one: Measured, options: RunOptions) -> None:
    """The new domains and tasks in place of those of their names, and beside the others; seconds and warnings."""
    new = _kept(one.evaluation).to_json()
    old = config["evaluation"] or {}
    merged = {kind: {**old.get(kind, {}), **of} for kind, of in new.items()}
    config["evaluation"] = merged
    machine = {"mxfx": version("mxfx"), "torch": version("torch"), "device": options.device}
    again = config.setdefault("evaluated_again", {})
    again |= {name: machine for of in new.values() for name in of}
    config["warnings"] = list(dict.fromkeys([*config["warnings"], *one.warnings]))
    seconds = sum(result["seconds"] for of in merged.values() for result in of.values())
    config["figures"] |= {"eval_seconds": seconds, "warnings": len(config["warnings"])}


def _write_card(
    folder: Path,
    program: Program,
    configs: list[dict[str, Any]],
    config: Mapping[str, Any],
    of_float: Mapping[str, Any],
) -> None:
    from mxfx.export.folder import write_card

    names = [config["name"], *([f"{config['name']} decode"] if config.get("phase") else [])]
    shown = [one for one in configs if one is of_float or (one["name"] in names and one["evaluation"])]
    models = [
        Measured(
            name=one["name"],
            evaluation=Evaluation({n: EvalResult.from_json(r) for n, r in one["evaluation"]["domains"].items()}, {}),
            bits_per_weight=one["figures"]["bits_per_weight"],
            baseline=of_float["name"],
        )
        for one in shown
    ]
    found = [row for row in domain_rows(models) if row.name in names]
    write_card(program, folder, card_table(found, config["figures"]["bits_per_weight"]))
