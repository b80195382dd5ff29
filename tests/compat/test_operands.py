"""What the dialect says of operands is done to the logits: against hooks on plain modules, nothing of mxfx in them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_utils import AttentionInterface

from mxfx.compat import from_pass_args, quantize_module_transform_pass
from mxfx.config.locate import parse_toml
from mxfx.graph.tiny import tiny
from mxfx.graph.trace import trace
from mxfx.pipeline.manager import PassManager
from mxfx.rewrite.size import bits_per_weight
from tests.reference.mase_hooks import hadamard, mxint, rotated_mxint

IDS = torch.randint(3, 128, (2, 21), generator=torch.Generator().manual_seed(0))
STAGES = ("qk_matmul", "av_matmul", "kv_cache", "softmax", "rope")
INPUT = "data_in_width = 4\ndata_in_block_size = 16\n"
FLOAT = "data_in_exponent_width = 3\ndata_in_frac_width = 4\n"


def minifloat(x: Tensor, exponent_bits: int = 3, fraction_bits: int = 4) -> Tensor:
    """Every code enumerated; the nearest value, of two the one with the even code; beyond the largest, the largest."""
    bias = 2 ** (exponent_bits - 1) - 1
    codes = [(e, f / 2**fraction_bits) for e in range(2**exponent_bits) for f in range(2**fraction_bits)]
    grid = np.array([(1 + f) * 2.0 ** (e - bias) if e else f * 2.0 ** (1 - bias) for e, f in codes])
    size = np.minimum(x.double().abs().numpy(), grid[-1])
    above = np.clip(np.searchsorted(grid, size), 1, len(grid) - 1)
    to_low, to_high = size - grid[above - 1], grid[above] - size
    up = (to_high < to_low) | ((to_high == to_low) & (above % 2 == 0))
    return torch.from_numpy(np.where(up, grid[above], grid[above - 1])).copysign(x.double()).to(x.dtype)


def pass_args(text: str) -> dict:
    raw = parse_toml("by = 'regex_name'\n" + text, "t.toml").value
    return {key: {"config": value} if isinstance(value, dict) else value for key, value in raw.items()}


def attention(name: str = "mxint", **stages: str) -> str:
    tables = [
        rf"['model\.layers\.\d+\.self_attn$'.{stage}]" + "\n" + stages.get(stage, "bypass = true\n") for stage in STAGES
    ]
    return r"['model\.layers\.\d+\.self_attn$']" + f"\nname = '{name}'\n" + "".join(tables)


def emitted(model: nn.Module, text: str) -> Tensor:
    result, _ = quantize_module_transform_pass(model, pass_args(text))
    with torch.no_grad():
        return result(IDS).logits


def reference(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def attend_with(model: nn.Module, *, q=None, k=None, v=None, scores=None, probs=None) -> None:
    """Let a model's attention round what is given; a hidden score is neither rounded nor part of a block."""

    def same(x: Tensor) -> Tensor:
        return x

    def attention(module, query, key, value, mask, scaling, **unused):
        query, key, value = ((f or same)(x) for f, x in ((q, query), (k, key), (v, value)))
        key, value = (x.repeat_interleave(module.num_key_value_groups, 1) for x in (key, value))
        weights = query @ key.transpose(2, 3) * scaling
        hidden = torch.ones(weights.shape[-2:], dtype=torch.bool).triu(1)
        weights = (scores or same)(weights.masked_fill(hidden, 0.0)).masked_fill(hidden, float("-inf"))
        weights = (probs or same)(weights.softmax(-1, dtype=torch.float32))
        return (weights.to(query.dtype) @ value).transpose(1, 2).contiguous(), None

    AttentionInterface.register("test-operands", attention)
    AttentionMaskInterface.register("test-operands", eager_mask)
    model.set_attn_implementation("test-operands")


@pytest.mark.parametrize("family", ["llama-tiny", "qwen3-tiny"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rope_rounds_cosines_and_sines(family: str, dtype: torch.dtype) -> None:
    model = tiny(family, dtype=dtype)
    model.model.rotary_emb.register_forward_hook(lambda _, args, out: tuple(minifloat(part) for part in out))
    plain = reference(tiny(family, dtype=dtype))
    expected, actual = reference(model), emitted(tiny(family, dtype=dtype), attention(rope=FLOAT))
    assert torch.equal(actual, expected)
    assert (expected - plain).norm() > 1e-3 * plain.norm()


@pytest.mark.parametrize(
    ("stages", "rounded"),
    [
        ({"qk_matmul": INPUT}, {"q": lambda x: mxint(x, 4, 16)}),
        ({"av_matmul": INPUT}, {"probs": lambda x: mxint(x, 4, 16)}),
        ({"softmax": FLOAT}, {"scores": minifloat}),
        (
            {"qk_matmul": INPUT, "av_matmul": INPUT, "kv_cache": INPUT, "softmax": FLOAT},
            {
                "scores": minifloat,
                **{name: lambda x: mxint(x, 4, 16) for name in ("q", "k", "v", "probs")},
            },
        ),
    ],
)
def test_operands_of_attention(stages: dict, rounded: dict) -> None:
    model = tiny("llama-tiny", dtype=torch.float32)
    attend_with(model, **rounded)
    expected, actual = reference(model), emitted(tiny("llama-tiny", dtype=torch.float32), attention(**stages))
    assert (actual - expected).norm() < 1e-6 * expected.norm()
    plain = reference(tiny("llama-tiny", dtype=torch.float32))
    assert (expected - plain).norm() > 1e-3 * plain.norm()


def test_queries_and_the_cache_round_in_a_rotated_basis() -> None:
    model = tiny("llama-tiny", dtype=torch.float32)
    turned = {name: lambda x: rotated_mxint(x, 4, 16) for name in ("q", "k", "v")}
    attend_with(model, **turned)
    text = attention("mxint_rotate", qk_matmul=INPUT, kv_cache=INPUT)
    actual = emitted(tiny("llama-tiny", dtype=torch.float32), text)
    assert (actual - reference(model)).norm() < 1e-6 * actual.norm()
    assert hadamard(16).shape == (16, 16)


def rotated_mxfp4(x: Tensor) -> Tensor:
    """E2M1 in blocks of 16, its scale 2^(⌊log2 max⌋ - 2), in the basis of a Hadamard matrix of the whole axis."""
    h = hadamard(x.shape[-1]).to(x.dtype)
    turned = (x @ h).unflatten(-1, (-1, 16))
    scale = torch.exp2(turned.abs().amax(-1, keepdim=True).log2().floor() - 2)
    return (minifloat(turned / scale, 2, 1) * scale).flatten(-2) @ h.mT


def test_row_11_mxfp_rotate_of_queries() -> None:
    model = tiny("llama-tiny", dtype=torch.float32)
    attend_with(model, q=rotated_mxfp4)
    floats = "data_in_exponent_width = 2\ndata_in_frac_width = 1\ndata_in_block_size = 16\n"
    actual = emitted(tiny("llama-tiny", dtype=torch.float32), attention("mxfp_rotate", qk_matmul=floats))
    assert (actual - reference(model)).norm() < 1e-6 * actual.norm()
    assert (actual - reference(tiny("llama-tiny", dtype=torch.float32))).norm() > 1e-3 * actual.norm()


def test_composite_modules() -> None:
    """Norms by input and gain, norms of queries and keys, the input of SiLU, the embedding."""
    text = (
        r"['model\.layers\.\d+\.(input|post_attention)_layernorm']" + "\nname = 'minifloat'\n"
        "weight_exponent_width = 3\nweight_frac_width = 4\n" + FLOAT + r"['model\.layers\.\d+\.mlp']"
        "\nname = 'minifloat'\n" + FLOAT + r"['model\.embed_tokens']" + "\nname = 'mxint'\n"
        "weight_width = 4\nweight_block_size = 16\n"
        + attention()
        + r"['model\.layers\.\d+\.self_attn$'.qk_norm]"
        + "\n"
        + FLOAT
    )
    model = tiny("qwen3-tiny", dtype=torch.float32, tie_word_embeddings=False)
    rounding = {"register_forward_pre_hook": lambda _, args: (minifloat(args[0]), *args[1:])}
    for name, module in model.named_modules():
        if name.endswith(("q_norm", "k_norm", "act_fn", "input_layernorm", "post_attention_layernorm")):
            module.register_forward_pre_hook(rounding["register_forward_pre_hook"])
        if name.endswith(("input_layernorm", "post_attention_layernorm")):
            module.weight.data = minifloat(module.weight.data)
    model.model.embed_tokens.weight.data = mxint(model.model.embed_tokens.weight.data, 4, 16)
    given = tiny("qwen3-tiny", dtype=torch.float32, tie_word_embeddings=False)
    expected = reference(model)
    assert (emitted(given, text) - expected).norm() < 1e-6 * expected.norm()


class TestTied:
    EMBEDDING = r"['model\.embed_tokens']" + "\nname = 'mxint'\nweight_width = {}\nweight_block_size = 16\n"
    HEAD = r"['lm_head']" + "\nname = 'mxint'\nweight_width = {}\nweight_block_size = 16\n"

    def compiled(self, text: str):
        model = tiny("llama-tiny", dtype=torch.float32, tie_word_embeddings=True)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        pipeline = from_pass_args(pass_args(text))
        return PassManager().run(trace(model), pipeline).program, model.lm_head.weight.detach()

    @pytest.mark.parametrize(("embedding", "head"), [(4, None), (None, 4), (4, 8)])
    def test_they_part_where_their_formats_differ(self, embedding: int | None, head: int | None) -> None:
        text = (self.EMBEDDING.format(embedding) if embedding else "") + (self.HEAD.format(head) if head else "")
        program, shared = self.compiled(text)
        for name, bits in (("model.embed_tokens.weight", embedding), ("lm_head.weight", head)):
            expected = shared if bits is None else mxint(shared, bits, 16)
            assert torch.equal(program.weights[name], expected), name

    def test_they_stay_one_tensor_where_they_agree(self) -> None:
        program, shared = self.compiled(self.EMBEDDING.format(4) + self.HEAD.format(4))
        assert program.weights.tied_to("lm_head.weight")
        assert torch.equal(program.weights["lm_head.weight"], mxint(shared, 4, 16))
        assert bits_per_weight(program) < bits_per_weight(self.compiled(self.EMBEDDING.format(4))[0])


def test_a_selector_of_another_family_is_a_warning() -> None:
    text = r"['model\.layers\.\d+\.mlp\.shared_expert\.up_proj']" + "\nname = 'mxint'\n" + INPUT
    text += r"['model\.layers\.\d+\.mlp\.up_proj']" + "\nname = 'mxint'\n" + INPUT
    with pytest.warns(UserWarning, match=r"annotate rule 1: match .*shared_expert.* fits no node"):
        emitted(tiny("llama-tiny"), text)


def test_passes_run_on_the_device_that_a_caller_sets() -> None:
    args = pass_args(r"['model\.layers\.\d+\.mlp\.up_proj']" + "\nname = 'mxint'\n" + INPUT)
    args["gptq"] = {"device": "nowhere:0", "format": "mxint", "weight_config": {"weight_width": 16}}
    args["gptq"]["weight_config"]["weight_block_size"] = 16
    with pytest.raises(RuntimeError, match="nowhere"):
        quantize_module_transform_pass(tiny("llama-tiny"), args)
    args["gptq"]["device"] = torch.device("cpu")
    assert quantize_module_transform_pass(tiny("llama-tiny"), args)[0].device.type == "cpu"
