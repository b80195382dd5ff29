"""JSON Schema of the pipeline file, for editors: every registered pass with its options and words."""

from __future__ import annotations

import inspect
from typing import Any

from mxfx.config.options import dataclass_schema
from mxfx.config.pipeline import SETTINGS, register_passes
from mxfx.rewrite import Pass, all_passes


def schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a pipeline file."""
    register_passes()
    passes = {name: _pass_schema(cls) for name, cls in sorted(all_passes().items())}
    tables: dict[str, Any] = {name: dataclass_schema(cls) for name, cls in SETTINGS.items()}
    tables["pass"] = {
        "type": "array",
        "description": "The passes, in the order in which they run; a pass may occur twice.",
        "items": {
            "type": "object",
            "required": ["name"],
            "properties": {"name": {"enum": list(passes)}},
            "oneOf": [{"$ref": f"#/$defs/{name}"} for name in passes],
        },
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "mxfx pipeline",
        "type": "object",
        "properties": tables,
        "required": ["pass"],
        "additionalProperties": False,
        "$defs": passes,
    }


def _pass_schema(cls: type[Pass]) -> dict[str, Any]:
    described = dataclass_schema(cls)
    name = {"const": cls.name, "description": (inspect.getdoc(cls) or cls.name).splitlines()[0]}
    return described | {
        "title": cls.name,
        "properties": {"name": name, **described["properties"]},
        "required": ["name", *described.get("required", [])],
    }
