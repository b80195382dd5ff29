"""Pipeline files and the command line to whole pipelines: nothing slow is imported for it, no weight is read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mxfx.config.errors import ConfigError, Place
from mxfx.config.locate import read_toml
from mxfx.driver.options import RunOptions
from mxfx.driver.run_directory import check_names

if TYPE_CHECKING:
    from mxfx.config.pipeline import Pipeline


def prepare(files: Sequence[str | Path], options: RunOptions) -> list[tuple[str, Pipeline]]:
    """Read and check every pipeline, command line applied, emit stage behind it.

    Raises ``ConfigError``; no weight is read.
    """
    names = [Path(file).stem for file in files]
    wrong = check_names(names)
    if wrong is not None:
        raise ConfigError(Place("command line"), wrong, "files with other names")
    for file in files:
        read_toml(file)
    # Passes import torch, which takes a second: what is no TOML is refused before.
    from mxfx.compat.tutorial import load_any
    from mxfx.config.order import check_order
    from mxfx.config.overrides import apply_overrides

    found = {name: load_any(file) for name, file in zip(names, files, strict=True)}
    if options.data is not None:
        found = {name: _with_data(pipeline, options.data) for name, pipeline in found.items()}
    if options.model is not None:
        named = [f"model.name={json.dumps(options.model)}"]
        found = {name: apply_overrides(pipeline, named, "--model") for name, pipeline in found.items()}
    # Settings first: they decide the emit stage, whose options an assignment may set.
    of_passes = [text for text in options.overrides if text.startswith("pass")]
    for assignment in options.overrides:
        if assignment not in of_passes:
            _override(found, assignment)
    for name, pipeline in found.items():
        found[name] = pipeline.emitted(options.device.partition(":")[0])
    for assignment in of_passes:
        _override(found, assignment)
    for pipeline in found.values():
        check_order(pipeline)
    return list(found.items())


def _with_data(pipeline: Pipeline, data: str) -> Pipeline:
    """With ``data`` in place of the data set that the file names; what the float model writes itself stays."""
    from mxfx.calibration.sources import SELF
    from mxfx.config.overrides import apply_overrides

    if any(spec.name == "rotation-search" and "dataset" in spec.options for spec in pipeline.specs):
        pipeline = apply_overrides(pipeline, [f"pass.rotation-search.dataset={json.dumps(data)}"])
    named = [source for source in pipeline.calibration.sources if source != SELF]
    if len(named) == 1 and SELF in pipeline.calibration.sources and data != SELF:
        sources = [source if source == SELF else data for source in pipeline.calibration.sources]
        return apply_overrides(pipeline, [f"calibration.dataset={json.dumps(sources)}"])
    given = [f"calibration.dataset={json.dumps(data)}"]
    was = pipeline.calibration
    alone = ["calibration.shares=[]"] * bool(was.shares) + ["calibration.continued=0"] * bool(was.continued)
    alone += ["calibration.repeat=false"] * (was.repeat and data == SELF)
    return apply_overrides(pipeline, [*alone, *given])


def _override(pipelines: dict[str, Pipeline], assignment: str) -> None:
    """Apply one assignment to every pipeline that has a place for it; one that none has is an error."""
    from mxfx.config.overrides import NoPlaceHere, apply_overrides

    missing: list[NoPlaceHere] = []
    for name, pipeline in pipelines.items():
        try:
            pipelines[name] = apply_overrides(pipeline, [assignment])
        except NoPlaceHere as error:
            missing.append(error)
    if len(missing) == len(pipelines):
        raise missing[0]
