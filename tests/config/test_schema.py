"""The JSON Schema says what the loader accepts."""

from __future__ import annotations

import json

from mxfx.config import schema
from mxfx.rewrite import all_passes


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
