"""Selectors: everything that is said must hold; text and value are one."""

from __future__ import annotations

import pytest

from mxfx.graph.node import path_of
from mxfx.rewrite import Selector
from tests.mixtures import raised_mixture
from tests.programs import raised


def _selected(text: str, family: str = "llama-tiny") -> list[str]:
    select = Selector.read(text)
    program = raised_mixture(family) if family in ("mixtral", "qwen2_moe") else raised(family)
    return [path_of(n).removeprefix("model.layers.") for n in program.products() if select(n)]


def test_an_expression_alone_is_matched_against_whole_paths() -> None:
    assert _selected(r".*\.0\.mlp\.(up|down)_proj") == ["0.mlp.up_proj", "0.mlp.down_proj"]
    assert _selected("up_proj") == []


def test_roles_and_groups_of_them() -> None:
    assert _selected("role: down_proj, qkv_proj", "phi3-tiny") == [
        "0.self_attn.qkv_proj", "0.mlp.down_proj", "1.self_attn.qkv_proj", "1.mlp.down_proj",
    ]  # fmt: skip
    assert _selected("role: mlp; layers: 1") == ["1.mlp.gate_proj", "1.mlp.up_proj", "1.mlp.down_proj"]
    assert _selected("role: attention; layers: 0", "phi3-tiny") == ["0.self_attn.qkv_proj", "0.self_attn.o_proj"]


@pytest.mark.parametrize(
    ("layers", "expected"), [("-1", [1]), ("0-1", [0, 1]), ("0, -1", [0, 1]), ("-2--1", [0, 1]), ("5", [])]
)
def test_layers_count_from_either_end(layers: str, expected: list[int]) -> None:
    assert _selected(f"role: o_proj; layers: {layers}") == [f"{i}.self_attn.o_proj" for i in expected]


def test_exceptions_and_types() -> None:
    shared = r"role: down_proj; except: .*\.shared_expert\..*; layers: 0"
    assert _selected(shared, "qwen2_moe") == ["0.mlp.experts.down_proj"]
    assert _selected("type: expert_linear; layers: 0", "mixtral") == [
        "0.mlp.experts.gate_up_proj",
        "0.mlp.experts.down_proj",
    ]


@pytest.mark.parametrize(
    "text",
    [r".*\.mlp\..*", r"(?:a|b):c", "role: down_proj; layers: 0-3, -1", r"name: .*x; except: .*\.y", "type: linear"],
)
def test_text_reads_back(text: str) -> None:
    assert Selector.read(str(Selector.read(text))) == Selector.read(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("(", "no regular expression"),
        ("role: dwon_proj", "did you mean 'down_proj'"),
        ("layers: a", "no range"),
        ("role: mlp; colour: red", "no clause"),
        ("role: mlp; role: head", "at most once"),
    ],
)
def test_what_cannot_be_meant_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Selector.read(text)
