"""A recurrent mixer is one node that runs transformers' own code at every length; linears around it are linears."""

from __future__ import annotations

import pytest
import torch
import transformers as T

from mxfx.graph.execute import execute
from mxfx.graph.text import parse, to_text
from mxfx.graph.tiny import shaken
from mxfx.graph.trace import trace
from mxfx.graph.verify import verify
from mxfx.ops.mixer import reference
from mxfx.runtime.causal_lm import emit
from tests.programs import RAISE, passed, relative


def hybrid() -> torch.nn.Module:
    """A layer of gated delta rule and one of attention."""
    torch.manual_seed(0)
    config = T.Qwen3NextConfig(
        vocab_size=131, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16,
        linear_value_head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
        shared_expert_intermediate_size=32, max_position_embeddings=256, initializer_range=0.1,
        layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    return shaken(T.AutoModelForCausalLM.from_config(config)).eval()


def test_a_hybrid_computes_what_transformers_computes_at_every_length_padded_and_not() -> None:
    model = hybrid()
    program = trace(model)
    verify(program)
    assert {str(n.args[1]).partition(":")[2] for n in program.nodes("mixer")} == {
        "causal_conv1d_fn",
        "torch_chunk_gated_delta_rule",
    }
    assert sum(1 for _ in program.nodes("linear")) == 18
    graph = emit(passed(program, RAISE))
    for length, padding in ((1, 0), (9, 2), (70, 0), (130, 5)):
        ids = torch.randint(3, 131, (2, length), generator=torch.Generator().manual_seed(length))
        mask = torch.ones_like(ids)
        mask[0, :padding] = 0
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        with torch.no_grad():
            expected = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        given = (ids, None, mask if padding else None)
        for actual in (execute(program, *given), graph(*given)):
            assert relative(actual[mask.bool()], expected[mask.bool()]) < 1e-5
    again = parse(to_text(program), program.weights)
    assert to_text(again) == to_text(program)


@pytest.mark.parametrize(
    "name",
    [
        "os:system",
        "transformers.models.qwen3_next.modeling_qwen3_next:torch",
        "transformers.models.qwen3_next.modeling_qwen3_next:missing",
        "transformers.models.qwen3_next.modeling_qwen3_next:l2norm",
        "transformers.utils:cached_file",
    ],
)
def test_a_name_in_a_file_calls_nothing_but_a_kernels_reference(name: str) -> None:
    with pytest.raises(ValueError, match="no function of transformers that a kernel may replace"):
        reference(name)
