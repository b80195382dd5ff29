"""Prefill and decode with formats of their own: rules of ``annotate`` by phase, and the passes one by one for both."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from mxfx.config import options
from mxfx.config.emit import EMIT_PASSES
from mxfx.config.locate import Cursor, KeyPath, Mark
from mxfx.config.spec import PassSpec
from mxfx.passes.annotate import Annotate, Rule

if TYPE_CHECKING:
    from mxfx.config.pipeline import Pipeline

_PARTING = Annotate.name


@dataclass(frozen=True)
class PhaseRules:
    """What one phase has of its own.

    rule: rules of ``annotate``, before those of the pass; for each operand the first that matches wins.
    """

    rule: tuple[Rule, ...] = ()


@dataclass(frozen=True)
class PhasesConfig:
    """Formats of their own for prefill and decode: two programs over one cache, which part at ``annotate``.

    A call of one token that finds others in the cache is decode, every other call is a prefill. Passes before
    ``annotate`` run once, those from there on for each phase; weights that come out alike are stored once.

    prefill: rules that hold in the prefill alone.
    decode: rules that hold in decode alone.
    handoff: what the cache holds of a prefill's keys and values: requantize rounds them once onto decode's format,
        keep leaves them as the prefill reads them, as numbers where the formats differ.
    """

    prefill: PhaseRules = PhaseRules()
    decode: PhaseRules = PhaseRules()
    handoff: Literal["requantize", "keep"] = "requantize"

    @property
    def given(self) -> bool:
        """Whether there are two phases: without a rule of its own a phase is what the other is."""
        return bool(self.prefill.rule or self.decode.rule)


def unrolled(pipeline: Pipeline) -> tuple[Pipeline, tuple[str, ...]]:
    """The passes one by one, as they run, and the phase of each: ``""`` for one that runs once for both.

    From ``annotate`` on every pass runs for one phase, then for the other; first for that in which gptq calibrates.
    """
    if not pipeline.phases.given:
        return pipeline, ("",) * len(pipeline.specs)
    start = _parting(pipeline)
    calibrated = {phase for _, phase in _calibrated(pipeline)}
    order = ("prefill", "decode") if calibrated == {"prefill"} else ("decode", "prefill")
    specs, phases = list(pipeline.specs[:start]), [""] * start
    for index, spec in enumerate(pipeline.specs[start:], start):
        specs += [_of_phase(pipeline, spec, phase) if index == start else spec for phase in order]
        phases += order
    return pipeline.replace(specs=specs, phases=PhasesConfig()), tuple(phases)


def of_phase(pipeline: Pipeline, phase: str) -> Pipeline:
    """The pipeline of one phase by itself."""
    if not pipeline.phases.given:
        return pipeline
    whole, phases = unrolled(pipeline)
    kept = [spec for spec, its in zip(whole.specs, phases, strict=True) if its in ("", phase)]
    return whole.replace(specs=kept)


def check_phases(pipeline: Pipeline) -> None:
    """Raise ``ConfigError``, which cites the line, for phases that cannot be."""
    calibrated = list(_calibrated(pipeline))
    if not pipeline.phases.given:
        for index, phase in calibrated:
            wanted = "[[phases.decode.rule]] or [[phases.prefill.rule]] with a format, or no phase"
            raise pipeline.error(index, ("phase",), f"phase = {phase!r}, and the pipeline has no phases", wanted)
        return
    for index, phase in calibrated[1:]:
        if phase != calibrated[0][1]:
            problem = f"phase = {phase!r}, and another gptq of the pipeline has {calibrated[0][1]!r}"
            raise pipeline.error(index, ("phase",), problem, "one phase in which weights are calibrated")
    for index, spec in enumerate(pipeline.specs[_parting(pipeline) :], _parting(pipeline)):
        if spec.name not in EMIT_PASSES and not spec.typed().by_phase:
            raise pipeline.error(
                index,
                ("name",),
                f"pass {spec.name!r} stands behind {_PARTING!r}, where the phases part: it would make two models of "
                "one, whose keys and values do not fit each other",
                f"it before {_PARTING!r}, or a pipeline without phases",
            )


def _parting(pipeline: Pipeline) -> int:
    found = next((index for index, spec in enumerate(pipeline.specs) if spec.name == _PARTING), None)
    if found is None:
        at = pipeline.root / "phases"
        raise at.error(
            f"the rules of phases are put before those of {_PARTING!r}, which the pipeline lacks", "that pass"
        )
    return found


def _calibrated(pipeline: Pipeline) -> Iterator[tuple[int, str]]:
    for index, spec in enumerate(pipeline.specs):
        if (phase := getattr(spec.value, "phase", None)) is not None:
            yield index, phase


def _of_phase(pipeline: Pipeline, spec: PassSpec, phase: str) -> PassSpec:
    """The pass ``annotate`` with a phase's rules in front; each rule is still found where it stands."""
    value = spec.typed()
    assert isinstance(value, Annotate)
    own: tuple[Rule, ...] = getattr(pipeline.phases, phase).rule
    value = dataclasses.replace(value, rule=(*own, *value.rule))
    there = pipeline.root.below(("phases", phase, "rule")).moved().marks
    here = spec.at.moved().marks
    marks: dict[KeyPath, Mark] = {("rule", *path): mark for path, mark in there.items() if path}
    for path, mark in here.items():
        moved = len(path) > 1 and path[0] == "rule"
        marks[("rule", int(path[1]) + len(own), *path[2:]) if moved else path] = mark
    written = options.write_fields(value, frozenset(spec.options))
    return PassSpec(spec.name, written, Cursor(spec.at.source, marks), value)
