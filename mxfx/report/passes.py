"""What passes there are, and what each did in a run."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping

from rich.console import Group
from rich.table import Table
from rich.text import Text

from mxfx.pipeline.manager import PipelineResult
from mxfx.rewrite import Pass


def summary(passes: Mapping[str, type[Pass]]) -> Table:
    """One row a pass: name, numerics promise, what it does."""
    table = Table(title=f"{len(passes)} passes", title_justify="left")
    for heading in ("pass", "numerics", "what it does"):
        table.add_column(heading)
    for name, cls in passes.items():
        table.add_row(name, Text(str(cls.numerics)), Text(inspect.getdoc(cls).splitlines()[0]))  # type: ignore[union-attr]
    return table


def describe(cls: type[Pass]) -> Group:
    """Contract, options and docstring of one pass."""
    contract = Table(show_header=False, box=None)
    for label in ("requires", "provides", "forbids", "removes"):
        contract.add_row(label, ", ".join(sorted(getattr(cls, label))) or "–")
    contract.add_row("numerics", Text(str(cls.numerics)))
    options = Table(title="options", title_justify="left")
    for heading in ("key", "type", "default"):
        options.add_column(heading)
    fields = dataclasses.fields(cls)
    for field in fields:
        options.add_row(field.name, Text(str(field.type)), Text(_default(field)))
    parts = [Text(cls.name, style="bold"), Text(inspect.getdoc(cls) or ""), contract]
    return Group(*parts, options if fields else Text("no options"))


def pass_table(result: PipelineResult, title: str) -> Table:
    """One row a pass of a run: matches, skips, time, warnings."""
    table = Table(title=title, title_justify="left")
    table.add_column("#", justify="right")
    table.add_column("pass")
    for heading in ("matched", "skipped", "seconds"):
        table.add_column(heading, justify="right")
    table.add_column("numbers")
    for step in result.steps:
        timing = step.findings.get("timing")
        seconds = timing.get("seconds") if isinstance(timing, Mapping) else timing
        table.add_row(
            str(step.index),
            step.pass_.name,
            str(len(step.record.matches)),
            str(len(step.record.skips)),
            f"{seconds:.2f}" if isinstance(seconds, int | float) else "–",
            Text(_numbers(step.findings)),
        )
    return table


def skip_lines(result: PipelineResult) -> Iterator[str]:
    """Every skip with its reason; near misses of a pattern (the deepest) first."""
    for step in result.steps:
        for skip in sorted(step.record.skips, key=lambda s: -s.depth):
            yield f"{step.pass_.name}: skipped {skip.node} ({skip.path or 'top level'}): {skip.reason}"


def _numbers(findings: Mapping[str, object]) -> str:
    parts = []
    for name in ("numerics", "ledger"):
        found = findings.get(name)
        if isinstance(found, Mapping):
            shown = {k: v for k, v in found.items() if isinstance(v, str | int | float)}
            parts += [f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items()]
    return ", ".join(parts)


def _default(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        return str(field.default)
    return "required" if field.default_factory is dataclasses.MISSING else str(field.default_factory())
