"""``transform-kv`` moves keys and values into another basis per key-value head."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import AutoModelForCausalLM, MiniCPM3Config

from mxfx.graph.module import build
from mxfx.graph.node import kind, path_of
from mxfx.graph.trace import trace
from mxfx.passes import Lower, SplitFused, TransformInputs, TransformKv, transform_kv
from mxfx.rewrite import apply
from tests.programs import RAISE, passed

FAMILIES = ["llama-tiny", "qwen2-tiny", "qwen3-tiny", "mistral-tiny", "gemma3-tiny", "phi3-tiny", "olmo2-tiny"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["hadamard", "wush"])
@pytest.mark.parametrize("block", [0, 8])
def test_logits_stay_with_keys_and_values_in_another_basis(family, kind, block, raised, preserved):
    _, record = preserved(TransformKv(kind=kind, block=block), raised(family))
    assert [m.note.split(",")[0] for m in record.matches] == ["keys", "values"] * 2


def test_values_cost_no_op_and_keys_two(raised, preserved):
    program, _ = preserved(TransformKv(kind="wush", block=8), raised("llama-tiny"))
    transforms = [n for n in program.graph.nodes if kind(n) == "block_transform"]
    assert len(transforms) == 2 * 2
    assert [kind(a) for a in next(program.nodes("attention")).args[:2]] == ["block_transform"] * 2


def test_keys_and_values_against_the_gradients_at_them(raised, preserved):
    program, _ = preserved(TransformKv(kind="wush", against="gradients", block=8), raised("llama-tiny"))
    plain, _ = preserved(TransformKv(kind="wush", block=8), raised("llama-tiny"))
    names = [n for n in program.weights if n.startswith("transforms.")]
    assert names and all(not torch.allclose(program.weights[n], plain.weights[n], rtol=1e-2) for n in names)


def test_keys_and_values_that_no_gradient_reaches_are_told(raised, ctx, monkeypatch):
    monkeypatch.setattr(transform_kv, "gradient_moments", lambda *given, **how: {})
    (said,) = apply(TransformKv(kind="wush", against="gradients", block=8), raised("llama-tiny"), ctx).record.warnings
    assert said.startswith("no gradient of the loss reaches ") and said.endswith("against queries and weights")


def test_every_key_value_head_has_its_own_matrix(raised, preserved):
    program, _ = preserved(TransformKv(kind="wush", block=8), raised("llama-tiny"))
    matrix = program.weights["transforms.model.layers.0.self_attn.k"]
    assert matrix.shape == (2, 2, 8, 8)
    assert not torch.allclose(matrix[0], matrix[1])


def test_the_matrix_of_keys_fits_the_models_dtype_and_that_of_queries_is_its_inverse(raised, ctx, logits):
    before = raised("llama-tiny")
    narrow = before.copy()
    narrow.dtype = torch.bfloat16
    after = apply(TransformKv(kind="wush", block=8), narrow, ctx).program
    keys, queries = (f"transforms.model.layers.0.self_attn.{side}" for side in "kq")
    assert (keys in after.weights.constants, queries in after.weights.constants) == (False, True)
    assert torch.equal(after.weights[keys].bfloat16().double(), after.weights[keys].double())
    error = (logits(after.twin(torch.float64)) - logits(before)).norm() / logits(before).norm()
    assert error < 1e-9


def test_the_emitted_module_computes_the_same(raised, ctx):
    before = raised("llama-tiny")
    after = apply(
        TransformInputs(kind="wush", block=16), apply(TransformKv(kind="wush", block=8), before, ctx).program, ctx
    )
    ids = torch.arange(3, 20)[None]
    old, new = (build(apply(Lower(), program, ctx).program)(ids) for program in (before, after.program))
    assert float((new - old).norm() / old.norm()) < 1e-9


def test_keys_alone(raised, preserved):
    before = raised("llama-tiny")
    program, record = preserved(TransformKv(block=8, values=False), before)
    assert len(record.matches) == 2
    values = [n for n in program.nodes("linear") if path_of(n).endswith("v_proj")]
    assert all(torch.equal(program.weights[program.weight_of(n)], before.weights[program.weight_of(n)]) for n in values)


@pytest.mark.parametrize("kind", ["hadamard", "wush"])
@pytest.mark.parametrize(
    ("values", "notes", "refused"),
    [
        (24, ["keys, {} 16", "values, {} 8 (16 does not divide 24)"], None),
        (9, ["keys, {} 16"], "no Hadamard matrix of order 16 fits the head dimension 9 of v"),
    ],
)
def test_latent_attention_s_keys_and_values_have_a_block_each(kind, values, notes, refused, preserved):
    """Keys of 16 channels, assembled from a latent and a rotated part, and values of another width."""
    torch.manual_seed(0)
    config = MiniCPM3Config(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=131, kv_lora_rank=16, q_lora_rank=24, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=values,
        initializer_range=0.1,
    )  # fmt: skip
    program = passed(trace(AutoModelForCausalLM.from_config(config).eval()), (*RAISE, SplitFused()))
    _, record = preserved(TransformKv(kind=kind, block=16), program.twin(torch.float64))
    said = [re.sub("(8|12|24) [(]", "8 (", match.note) for match in record.matches]
    assert said == [note.format(kind) for note in notes] * 2
    assert {skip.reason for skip in record.skips} == ({refused} if refused else set())
