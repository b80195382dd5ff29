"""Roles are read from the dataflow: the same in every family, whatever its modules are called."""

from __future__ import annotations

from functools import cache

import pytest
import transformers
from torch import fx

from mxfx.graph.node import path_of
from mxfx.graph.program import Program
from mxfx.graph.trace import trace
from mxfx.ops.catalogue import spec
from mxfx.rewrite.roles import role_of, roles_remembered
from tests.mixtures import raised_mixture
from tests.programs import RAISE, passed, raised

ATTENTION = ["q_proj", "k_proj", "v_proj", "attention", "o_proj"]
GATED = ["gate_proj", "up_proj", "down_proj"]
PLAIN = ["up_proj", "down_proj"]
EXPERTS = ["gate_up_proj", "down_proj"]

#: Configuration class, what it adds, and the roles of its last layer in the order of the graph.
OTHERS = {
    "parallel blocks, spelled-out GELU": ("PhiConfig", {"partial_rotary_factor": 0.5}, [*ATTENTION, *PLAIN]),
    "plain MLP": ("Starcoder2Config", {}, [*ATTENTION, *PLAIN]),
    "fused, LayerNorm": ("GPTNeoXConfig", {}, ["qkv_proj", "attention", "o_proj", *PLAIN]),
    "learned positions": ("OPTConfig", {"ffn_dim": 96, "word_embed_proj_dim": 64}, [*ATTENTION, *PLAIN]),
    "squared ReLU": ("NemotronConfig", {}, [*ATTENTION, *PLAIN]),
}
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 256, "pad_token_id": 0,
}  # fmt: skip


def _roles(program: Program, layer: str = ".layers.1.") -> list[str]:
    return [role_of(n) for n in program.graph.nodes if layer in path_of(n) and _has_one(n)]


def _has_one(node: fx.Node) -> bool:
    return spec(node).product is not None or spec(node).concept == "attention"


@cache
def _other(name: str) -> Program:
    class_name, extra, _ = OTHERS[name]
    config = getattr(transformers, class_name)(**{**SIZES, **extra})
    return passed(trace(transformers.AutoModelForCausalLM.from_config(config).eval()), RAISE)


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama-tiny", [*ATTENTION, *GATED]),
        ("gemma3-tiny", [*ATTENTION, *GATED]),
        ("phi3-tiny", ["qkv_proj", "attention", "o_proj", "gate_up_proj", "down_proj"]),
    ],
)
def test_a_layer_of_a_gated_model(family: str, expected: list[str]) -> None:
    assert _roles(raised(family)) == expected


@pytest.mark.parametrize("name", OTHERS)
def test_a_layer_of_another_structure(name: str) -> None:
    assert _roles(_other(name)) == OTHERS[name][2]


def test_layers_of_experts() -> None:
    assert _roles(raised_mixture("mixtral")) == [*ATTENTION, "router", *EXPERTS]
    shared = _roles(raised_mixture("qwen2_moe"))
    assert sorted(shared) == sorted([*ATTENTION, *GATED, "router", *EXPERTS, ""])


def test_experts_of_an_attention_and_what_chooses_them() -> None:
    """Rows are put back to their tokens by what the router says; that makes no query of it."""
    assert _roles(raised_mixture("jetmoe")) == [
        "router",
        "q_proj",
        "kv_proj",
        "attention",
        "o_proj",
        "router",
        *EXPERTS,
    ]


def test_latent_attention() -> None:
    config = transformers.DeepseekV2Config(
        **{**SIZES, "num_key_value_heads": 4}, kv_lora_rank=32, q_lora_rank=32, qk_rope_head_dim=16,
        qk_nope_head_dim=16, v_head_dim=16, first_k_dense_replace=2,
    )  # fmt: skip
    program = passed(trace(transformers.AutoModelForCausalLM.from_config(config).eval()), RAISE)
    assert _roles(program) == ["latent", "q_proj", "latent", "kv_proj", "attention", "o_proj", *GATED]


@pytest.mark.parametrize("name", ["llama-tiny", "phi3-tiny"])
def test_embedding_and_head(name: str) -> None:
    roles = [role_of(n) for n in raised(name).graph.nodes if ".layers." not in path_of(n)]
    assert [role for role in roles if role] == ["embed", "head"]


def test_roles_that_are_remembered_are_those_of_the_graph_and_forgotten_when_it_changes() -> None:
    program = raised("llama-tiny").copy()
    alone = [role_of(node) for node in program.graph.nodes]
    with roles_remembered(program.graph):
        assert [role_of(node) for _ in range(2) for node in program.graph.nodes] == 2 * alone
    last = next(node for node in reversed(program.graph.nodes) if spec(node).concept == "linear")
    assert role_of(last) == "head"
    output = next(node for node in program.graph.nodes if node.op == "output")
    output.args = (last.args[0],)
    assert role_of(last) != "head"
