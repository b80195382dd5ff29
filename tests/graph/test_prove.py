"""A trace proves itself: what computes something else than its model is refused, and the message says where."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers as T
from torch import fx

from mxfx.graph.prove import UnfaithfulTrace, prove
from mxfx.graph.tiny import tiny
from mxfx.graph.trace import trace
from tests.graph.test_masks import built
from tests.programs import model, traced


def test_a_right_trace_is_proven_to_the_last_bit_beyond_its_window() -> None:
    proof = prove(traced("gemma3-tiny"), model("gemma3-tiny"))
    assert proof.error == 0 and proof.lengths[0] < 5 + 3 < proof.lengths[1] and proof.notes == ()


def attention_in(layer: int) -> Callable[[fx.Graph], fx.Node]:
    return lambda graph: [n for n in graph.nodes if n.target is torch.ops.mxfx.attention.default][layer]


def first(target: object) -> Callable[[fx.Graph], fx.Node]:
    return lambda graph: next(n for n in graph.nodes if n.target is target)


@pytest.mark.parametrize(
    ("find", "place", "wrong", "where"),
    [
        (attention_in(1), 6, 4, r"unpadded rows of 5 .* is model\.layers\.1\.self_attn"),
        (attention_in(0), 3, None, r"padded rows of 21 .* is model\.layers\.0\.self_attn"),
        (attention_in(0), 6, 6, r"padded rows of 21 .* is model\.layers\.0\.self_attn"),
        (first(torch.ops.aten.rsqrt.default), None, None, r"is model\.layers\.0\.input_layernorm"),
    ],
)
def test_a_wrong_program_is_refused_with_the_first_module_that_differs(find, place, wrong, where: str) -> None:
    program = traced("mistral-tiny").copy()
    node = find(program.graph)
    if place is None:
        node.target = torch.ops.aten.sqrt.default
    else:
        node.update_arg(place, wrong)
    with pytest.raises(UnfaithfulTrace, match=where):
        prove(program, model("mistral-tiny"))


def test_a_window_that_is_too_long_to_try_is_said() -> None:
    proof = prove(traced("mistral-tiny"), model("mistral-tiny"), limit=6)
    assert proof.lengths == (5, 6)
    assert proof.notes == ("what lies beyond 5 tokens (a window, a chunk, or RoPE's first length) was not tried",)


def test_tracing_a_model_with_weights_proves_it_and_leaves_its_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    hf = tiny("llama-tiny").train()
    monkeypatch.setattr("mxfx.graph.masks.attention_forward.__defaults__", (None, None, 0.5, None, None, None, None))
    with pytest.raises(UnfaithfulTrace, match=r"model\.layers\.0\.self_attn"):
        trace(hf)
    assert hf.training and all(m.training for m in hf.modules())
    trace(hf, proven=False)
    with torch.device("meta"):
        trace(type(hf)(hf.config))


def test_a_padded_row_that_the_model_itself_cannot_compute_is_left_out_and_said() -> None:
    """Eager attention takes softmax in float32, where float64's least number is -inf: a hidden row is NaN."""
    gemma2 = built(T.Gemma2Config, query_pre_attn_scalar=16, sliding_window=5).double()
    program = trace(gemma2)
    proof = prove(program, gemma2)
    assert proof.error < 1e-6
    assert proof.notes == ("padding was not tried: in float64 the model's own logits of a padded row are not finite",)
    attention_in(1)(program.graph).update_arg(4, 1.0)
    with pytest.raises(UnfaithfulTrace, match="rows of 5 tokens"):
        prove(program, gemma2)
