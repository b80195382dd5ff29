"""The page's templates, filled in: every value is escaped unless a template made it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


def render(name: str, **values: Any) -> Markup:
    """A template of ``mxfx/report/templates``. Raises ``jinja2.UndefinedError`` for a value that it lacks."""
    return Markup(_ENVIRONMENT.get_template(name).render(values))


def called(step: Mapping[str, Any]) -> str:
    """The name of a pass in ``results.json``, and the phase that it ran for."""
    return f"{step['pass']} ({step['phase']})" if step.get("phase") else str(step["pass"])


def _number(value: float | None, form: str, none: str = "–") -> str:
    return none if value is None else format(value, form)


def _shown(value: float | None, form: str) -> str:
    """JSON has no NaN: a figure that is none is null in a file."""
    return _number(value, form, "nan")


_ENVIRONMENT = Environment(
    loader=PackageLoader("mxfx.report"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.filters |= {"number": _number, "shown": _shown, "repr": repr, "said": lambda name: name.replace("_", " ")}
_ENVIRONMENT.filters["called"] = called
