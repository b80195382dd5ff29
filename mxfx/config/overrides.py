"""``--set calibration.samples=8``, ``--set pass.gptq.damp=0.05``, ``--set 'pass[3].damp=0.1'``."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import tomli

from mxfx.config import options
from mxfx.config.errors import ConfigError, Place
from mxfx.config.locate import Cursor, KeyPath, Mark
from mxfx.config.pipeline import SETTINGS, Pipeline
from mxfx.ground.nearest import did_you_mean

_PART = re.compile(r"([A-Za-z0-9_-]+)((?:\[\d+\])*)(?:\.|$)")
_FORMS = "TABLE.KEY=VALUE, pass.NAME.KEY=VALUE or pass[INDEX].KEY=VALUE"


class NoPlaceHere(ConfigError):
    """The pipeline has not what an assignment sets: the pass, sources to share; another of the same run may."""


def apply_overrides(pipeline: Pipeline, assignments: Iterable[str], source: str = "--set") -> Pipeline:
    """The pipeline with each ``key=value`` applied in turn.

    Values are TOML (``8``, ``0.05``, ``true``, ``["a"]``), anything else is a string. ``pass.NAME.key`` sets
    the key of every pass of that name; ``pass[3].key`` counts from 0, the raise passes included, as ``config
    show`` lists them. Raises ``ConfigError`` that points into the assignment.
    """
    for assignment in assignments:
        pipeline = _apply(pipeline, assignment, source)
    return pipeline


def _apply(pipeline: Pipeline, assignment: str, source: str) -> Pipeline:
    left, equals, right = assignment.partition("=")
    key = Place(source, 1, 1, assignment)
    if not equals:
        raise ConfigError(key, f"{assignment!r} sets nothing", _FORMS)
    path = _path(left.strip(), key)
    mark = Mark(key, Place(source, 1, len(left) + 2, assignment))
    at = Cursor(source, {(): mark})
    raw = _value(right.strip())
    if path[0] == "pass":
        return _set_in_passes(pipeline, path[1:], raw, at)
    if path[0] not in SETTINGS:
        names = [*SETTINGS, "pass"]
        raise at.error(f"unknown table {path[0]!r}", _FORMS, did_you_mean(str(path[0]), names), of_key=True)
    if len(path) != 2:
        raise at.error(f"{left!r} names no key of [{path[0]}]", f"{path[0]}.KEY=VALUE", of_key=True)
    return _set_setting(pipeline, str(path[0]), str(path[1]), raw, at)


def _path(text: str, place: Place) -> KeyPath:
    path: list[str | int] = []
    at = 0
    while at < len(text):
        part = _PART.match(text, at)
        if part is None:
            raise ConfigError(place, f"{text!r} is no key", _FORMS)
        path += [part[1], *(int(index) for index in re.findall(r"\d+", part[2]))]
        at = part.end()
    if len(path) < 2 or text.endswith("."):
        raise ConfigError(place, f"{text!r} is no key", _FORMS)
    return tuple(path)


def _value(text: str) -> object:
    try:
        document = tomli.loads(f"v = {text}")
    except tomli.TOMLDecodeError:
        return text
    return document["v"] if len(document) == 1 else text


def _set_setting(pipeline: Pipeline, table: str, key: str, raw: object, at: Cursor) -> Pipeline:
    cls = SETTINGS[table]
    if key not in options.fields(cls):
        names = options.fields(cls)
        raise at.error(
            f"unknown key {key!r} in [{table}]",
            f"one of {options.listed(names)}",
            did_you_mean(key, names),
            of_key=True,
        )
    value = options.read(options.hint_of(cls, key), raw, at)
    old = getattr(pipeline, table)
    try:
        new = dataclasses.replace(old, **{key: value})
    except ValueError as error:
        sources = set(pipeline.calibration.sources)
        homeless = {
            "shares": len(pipeline.calibration.sources) == 1,
            "continued": not {"self"} < sources,
            "repeat": sources == {"self"},
        }
        kind = NoPlaceHere if homeless.get(key) else ConfigError
        found = at.error(str(error))
        raise kind(found.place, found.problem, found.expected, found.hint) from error
    marks: Mapping[KeyPath, Mark] = {**pipeline.root.marks, (table, key): at.marks[()]}
    changes: dict[str, Any] = {table: new, "root": Cursor(pipeline.root.source, marks)}
    return pipeline.replace(**changes)


def _set_in_passes(pipeline: Pipeline, path: KeyPath, raw: object, at: Cursor) -> Pipeline:
    chosen = _chosen(pipeline, path[0], at)
    if len(path) < 2:
        raise at.error("no key of the pass is named", _FORMS, of_key=True)
    specs = [spec.with_option(path[1:], raw, at) if i in chosen else spec for i, spec in enumerate(pipeline.specs)]
    return pipeline.replace(specs=specs)


def _chosen(pipeline: Pipeline, which: str | int, at: Cursor) -> set[int]:
    names = [spec.name for spec in pipeline.specs]
    listing = ", ".join(f"[{i}] {name}" for i, name in enumerate(names))
    if isinstance(which, int):
        if which >= len(names):
            raise at.error(f"the pipeline has no pass [{which}]", listing, of_key=True)
        return {which}
    chosen = {i for i, name in enumerate(names) if name == which}
    if not chosen:
        error = at.error(f"the pipeline has no pass {which!r}", listing, did_you_mean(which, names), of_key=True)
        raise NoPlaceHere(error.place, error.problem, error.expected, error.hint)
    return chosen
