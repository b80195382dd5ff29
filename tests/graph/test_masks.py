"""Masks of every kind come out of a trace as functions of places, and attention gets what the model's own gets."""

from __future__ import annotations

import pytest
import torch
import transformers as T
from torch import Tensor
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    chunked_overlay,
    or_masks,
    sliding_window_overlay,
)

from mxfx.graph.errors import TraceError
from mxfx.graph.execute import execute
from mxfx.graph.masks import attention_forward, mask_forward
from mxfx.graph.node import operands
from mxfx.graph.program import Program
from mxfx.graph.tiny import shaken
from mxfx.graph.trace import trace
from mxfx.graph.verify import verify
from mxfx.ops import attend, attention, attention_bias
from tests.programs import relative

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 131, "max_position_embeddings": 64,
    "initializer_range": 0.1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


def built(config: type, **more: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return shaken(T.AutoModelForCausalLM.from_config(config(**SIZES, **more))).eval()


MODELS = {
    "soft cap": lambda: built(T.Gemma2Config, sliding_window=5, query_pre_attn_scalar=16),
    "sinks": lambda: built(T.GptOssConfig, sliding_window=5, **EXPERTS),
    "chunks": lambda: built(
        T.Llama4TextConfig, attention_chunk_size=8, interleave_moe_layer_step=2, intermediate_size_mlp=96,
        num_local_experts=4, num_experts_per_tok=1,
    ),
    "a window that only the mask knows": lambda: built(T.PhimoeConfig, sliding_window=5, **EXPERTS),
    "an additive mask": lambda: T.AutoModelForCausalLM.from_config(
        T.GPTJConfig(n_embd=64, n_layer=2, n_head=4, rotary_dim=8, n_positions=64, vocab_size=131)
    ).eval(),
    "linear biases (ALiBi)": lambda: T.AutoModelForCausalLM.from_config(
        T.BloomConfig(hidden_size=64, n_layer=2, n_head=4, vocab_size=131, initializer_range=0.1)
    ).eval(),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_padded_and_not_short_and_beyond_the_window_logits_are_those_of_the_model(name: str) -> None:
    model = MODELS[name]()
    program = trace(model)
    verify(program)
    for length, padding in ((3, 0), (3, 1), (21, 0), (21, 6)):
        ids = torch.randint(3, 131, (2, length), generator=torch.Generator().manual_seed(length))
        mask = torch.ones_like(ids)
        mask[0, :padding] = 0
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        with torch.no_grad():
            given = {} if name.startswith("linear") else {"position_ids": positions}
            expected = model(input_ids=ids, attention_mask=mask, use_cache=False, **given).logits
        actual = execute(program, ids, None, mask if padding else None)
        assert relative(actual[mask.bool()], expected[mask.bool()]) < 1e-5, (length, padding)


def attributes(program: Program) -> list[tuple]:
    return [tuple(operands(n)[name] for name in ("causal", "window", "chunk")) for n in program.nodes("attention")]


def test_windows_and_chunks_are_attributes_of_their_layers() -> None:
    assert attributes(trace(MODELS["soft cap"]())) == [(True, 5, None), (True, None, None)]
    assert {chunk for _, _, chunk in attributes(trace(MODELS["chunks"]()))} == {8}


class OneLayer(torch.nn.Module):
    """Attention over embeddings under any mask function."""

    def __init__(self, mask_function) -> None:
        super().__init__()
        self.config = T.LlamaConfig(vocab_size=31, hidden_size=16, num_attention_heads=2, max_position_embeddings=64)
        self.embed = torch.nn.Embedding(31, 16)
        self.mask_function = mask_function

    def forward(self, input_ids: Tensor, position_ids=None, attention_mask=None, use_cache=False):
        batch, length = input_ids.shape
        x = self.embed(input_ids).unflatten(-1, (2, 8)).transpose(1, 2)
        real = attention_mask.to(torch.bool)
        allowed = mask_forward(batch, length, length, self.mask_function, real, device=input_ids.device)
        out, _ = attention_forward(self, x, x, x, allowed)
        return type("Output", (), {"logits": out.flatten(-2)})


def prefix_of_four(row, head, query, key):
    return key < 4


def hidden_by(function, real: Tensor) -> Tensor:
    """The mask of a function, entry by entry."""
    batch, length = real.shape
    cells = [
        [[bool(function(b, 0, torch.tensor(q), torch.tensor(k))) for k in range(length)] for q in range(length)]
        for b in range(batch)
    ]
    return torch.tensor(cells) & real.bool()[:, None, :] | torch.eye(length, dtype=torch.bool)


@pytest.mark.parametrize(
    "function",
    [
        causal_mask_function,
        and_masks(causal_mask_function, sliding_window_overlay(3)),
        and_masks(sliding_window_overlay(5), and_masks(causal_mask_function, sliding_window_overlay(3))),
        or_masks(causal_mask_function, prefix_of_four),
        and_masks(or_masks(causal_mask_function, prefix_of_four), sliding_window_overlay(6)),
    ],
)
def test_any_mask_function_means_what_it_says_of_each_query_and_key(function) -> None:
    torch.manual_seed(0)
    layer = OneLayer(function).eval()
    ids = torch.randint(0, 31, (2, 9))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9])
    x = layer.embed(ids).unflatten(-1, (2, 8)).transpose(1, 2)
    program = trace(layer, proven=False)
    verify(program)
    for given in (mask, torch.ones_like(mask)):
        expected = attend(x, x, x, hidden_by(function, given)[:, None], 8**-0.5, False).transpose(1, 2).flatten(-2)
        assert torch.allclose(execute(program, ids, None, given), expected, atol=1e-6)
    assert torch.allclose(execute(program, ids), expected, atol=1e-6)


def test_an_argument_of_attention_that_the_dialect_lacks_is_refused_by_name() -> None:
    x = torch.zeros(1, 2, 3, 8)
    with pytest.raises(TraceError, match="gives attention 'block_indices', which the dialect cannot express"):
        attention_forward(torch.nn.Module(), x, x, x, None, block_indices=torch.zeros(1))


@pytest.mark.parametrize(
    "more", [{}, {"window": 4}, {"chunk": 3}, {"softcap": 0.7}, {"sinks": torch.tensor([0.3, -1])}]
)
@pytest.mark.parametrize("padding", [0, 2])
def test_the_last_queries_see_the_same_with_and_without_those_before_them(more: dict, padding: int) -> None:
    """A cache holds the earlier keys; what is computed against it is the end of what is computed at once."""
    q, k, v = (torch.randn(2, 2, 11, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    mask = None
    if padding:
        mask = torch.ones(2, 11, dtype=torch.int64)
        mask[0, :padding] = 0
    whole = attention(q, k, v, mask, 0.3, **more)
    for queries in (1, 3):
        assert torch.allclose(attention(q[:, :, -queries:], k, v, mask, 0.3, **more), whole[:, :, -queries:], atol=1e-6)


def test_sinks_come_under_either_name_for_each_head_or_for_each_query() -> None:
    q, k, v = (torch.randn(2, heads, 7, 8, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2, 2))
    sinks = torch.randn(2, 4, 7, 1, generator=torch.Generator().manual_seed(0))

    def attended(**more: Tensor) -> Tensor:
        return attention_forward(torch.nn.Module(), q, k, v, None, 0.3, True, **more)[0]

    scores = (q @ k.repeat_interleave(2, 1).mT * 0.3).masked_fill(~torch.ones(7, 7).tril().bool(), float("-inf"))
    probs = torch.cat((scores, sinks), -1).softmax(-1)[..., :-1]
    expected = (probs @ v.repeat_interleave(2, 1)).transpose(1, 2)
    torch.testing.assert_close(attended(sinks=sinks), expected)
    of_heads = sinks[0, :, 0, 0]
    assert torch.equal(attended(sinks=of_heads), attended(s_aux=of_heads))
    torch.testing.assert_close(attended(sinks=of_heads), attended(sinks=of_heads[None, :, None, None]))
    for wrong in (sinks[:, :3], sinks[..., 0], of_heads[:2]):
        with pytest.raises(ValueError, match="one for each of the 4 query heads is needed"):
            torch.ops.mxfx.attention(*(x.to("meta") for x in (q, k, v)), None, 0.3, sinks=wrong.to("meta"))


def test_chunks_are_counted_from_the_first_real_token() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
    x = torch.zeros(1, 1, 7, 4)
    padded = attention_bias(mask, x, x, True, None, 3)[0, 0, 2:, 2:]
    alone = attention_bias(None, x[:, :, 2:], x[:, :, 2:], True, None, 3)[0, 0]
    assert torch.equal(padded, alone)
    chunks = chunked_overlay(3, torch.tensor([2]))
    assert torch.equal(
        alone,
        torch.tensor([[k <= q and bool(chunks(0, 0, q + 2, k + 2)) for k in range(5)] for q in range(5)]),
    )
