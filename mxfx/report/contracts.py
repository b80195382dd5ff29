"""What passes there are: the contract and the options of each."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping

from rich.console import Group
from rich.table import Table
from rich.text import Text

from mxfx.config.options import field_notes
from mxfx.rewrite import Pass


def summary(passes: Mapping[str, type[Pass]]) -> Table:
    """One row a pass: name, numerics promise, what it does."""
    table = Table(title=f"{len(passes)} passes", title_justify="left")
    for heading in ("pass", "numerics", "what it does"):
        table.add_column(heading)
    for name, cls in passes.items():
        table.add_row(name, Text(str(cls.numerics)), Text(inspect.getdoc(cls).splitlines()[0]))
    return table


def describe(cls: type[Pass]) -> Group:
    """Contract, options and docstring of one pass."""
    contract = Table(show_header=False, box=None)
    for label in ("requires", "provides", "forbids", "expects"):
        contract.add_row(label, ", ".join(sorted(getattr(cls, label))) or "–")
    contract.add_row("numerics", Text(str(cls.numerics)))
    options = Table(title="options", title_justify="left")
    for heading in ("key", "type", "default", "what it is"):
        options.add_column(heading)
    fields, words = dataclasses.fields(cls), field_notes(cls)
    for field in fields:
        options.add_row(field.name, Text(str(field.type)), Text(_default(field)), Text(words.get(field.name, "")))
    parts = [Text(cls.name, style="bold"), Text(inspect.getdoc(cls) or ""), contract]
    return Group(*parts, options if fields else Text("no options"))


def _default(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        return str(field.default)
    return "required" if field.default_factory is dataclasses.MISSING else str(field.default_factory())
