"""The JSON Schema says what the loader accepts."""

from __future__ import annotations

import dataclasses
import json
from typing import get_args

from mxfx.config import schema
from mxfx.config.options import field_notes, fields, hint_of
from mxfx.config.pipeline import register_passes
from mxfx.formats import Format
from mxfx.rewrite import Selector, all_passes


def test_every_registered_pass_is_described_with_its_options() -> None:
    described = schema()["$defs"]
    assert set(described) == set(all_passes())
    solve = described["stub-solve"]
    assert solve["additionalProperties"] is False
    assert solve["properties"]["damp"] == {
        "type": "number",
        "description": "added to the diagonal, as a fraction of its mean.",
        "default": 0.01,
    }
    assert solve["properties"]["order"]["enum"] == ["block", "none"]
    assert "default" not in solve["properties"]["samples"]
    assert solve["required"] == ["name"]


def test_nested_rules_are_described_down_to_their_words() -> None:
    rule = schema()["$defs"]["stub-mark"]["properties"]["rule"]["items"]
    assert rule["required"] == ["match"]
    assert "role: down_proj" in rule["properties"]["match"]["examples"][1]
    assert rule["properties"]["weight"]["description"] == "format of the weight, which the docstring continues here."


def test_it_is_json() -> None:
    assert json.loads(json.dumps(schema()))["properties"]["model"]["properties"]["dtype"]["default"] == "bfloat16"


def test_every_option_of_every_pass_has_words() -> None:
    register_passes()
    silent = {
        f"{name}: {field}"
        for name, cls in all_passes().items()
        if not name.startswith(("stub-", "test-"))
        for owner in (cls, *tables_of(cls))
        for field in fields(owner)
        if field not in field_notes(owner)
    }
    assert silent == set(), "say each in a line 'name: words' of the docstring"


def tables_of(cls: type) -> list[type]:
    """The dataclasses that the options of a pass are made of (``annotate``'s rules)."""
    hints = [hint_of(cls, name) for name in fields(cls)]
    inner = [argument for hint in hints for argument in (hint, *get_args(hint))]
    return [
        one
        for one in inner
        if dataclasses.is_dataclass(one) and isinstance(one, type) and one not in (Format, Selector)
    ]
