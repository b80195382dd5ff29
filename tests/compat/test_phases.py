"""Buckets for prefill and decode in the tutorial's dialect, against what Mase's own functions and tests say of them."""

from __future__ import annotations

import re

import pytest
import torch

from mxfx.compat import quantize_module_transform_pass
from mxfx.compat.tutorial import from_tutorial
from mxfx.config import ConfigError, Pipeline, loads, to_toml
from mxfx.config.locate import parse_toml
from mxfx.formats import parse
from mxfx.runtime.causal_lm import EmittedCausalLM
from tests.programs import model, padded_batch

ATTENTION, LINEAR = r"model\.layers\.\d+\.self_attn", r"model\.layers\.\d+\.(self_attn|mlp)\.[a-z]+_proj"
KV = {"data_in_block_size": 16, "data_in_width": 4}
W4A8 = {"weight_block_size": 32, "weight_width": 4, "data_in_block_size": 32, "data_in_width": 8}


def pipeline(text: str) -> Pipeline:
    document = parse_toml(text, "p.toml")
    return from_tutorial(document.value, document.root)


def of(attention: dict | None = None, linear: dict | None = None) -> Pipeline:
    given = {ATTENTION: attention, LINEAR: linear}
    raw = {key: {"name": "mxint", **value} for key, value in given.items() if value is not None}
    return from_tutorial({"by": "regex_name", **raw}, parse_toml("", "p.toml").root)


def formats(found: Pipeline) -> dict[str, list[dict[str, str]]]:
    rules = {phase: getattr(found.phases, phase).rule for phase in ("prefill", "decode")}
    return {phase: [{k: str(f) for k, f in rule.formats().items()} for rule in of] for phase, of in rules.items()}


def test_a_bucket_alone_is_a_prefill_in_float() -> None:
    """Mase: test_decode_only_shorthand_defaults_prefill_to_bypass."""
    found = of({"decode": {"kv_cache": KV}}, {"decode": W4A8})
    expected = [{"kv": "mxint4@16/ceil"}, {"weight": "mxint4@32/ceil", "input": "mxint8@32/ceil"}]
    assert formats(found) == {"prefill": [], "decode": expected}
    assert found.phases.handoff == "keep"
    assert loads(to_toml(found)) == found


def test_a_prefill_alone_is_both_and_fp_only_leaves_decode_in_float() -> None:
    both = of(linear={"prefill": W4A8})
    assert formats(both)["prefill"] == formats(both)["decode"] != []
    float_ = of(linear={"prefill": W4A8, "decode": W4A8, "decode_policy": "fp_only"})
    assert formats(float_)["prefill"] and not formats(float_)["decode"]


def test_a_flat_selector_beside_buckets_is_of_both_phases() -> None:
    found = of({"decode": {"kv_cache": KV}}, W4A8)
    assert formats(found)["prefill"] == formats(found)["decode"][1:]


def test_handoffs() -> None:
    """Mase: test_kv_handoff_decode_format_mirrors_…, …_defaults_to_fp_…, test_explicit_prefill_kv_beats_…"""
    decode = {"decode": {"kv_cache": KV}}
    assert of({**decode, "kv_cache_handoff": "decode_format"}).phases.handoff == "requantize"
    assert of({**decode, "kv_cache_handoff": "fp"}).phases.handoff == "keep"
    explicit = {"bypass": True, "kv_cache": {"data_in_block_size": 16, "data_in_width": 8}}
    found = of({**decode, "prefill": explicit, "kv_cache_handoff": "decode_format"})
    assert found.phases.handoff == "keep" and formats(found)["prefill"] == [{"kv": "mxint8@16/ceil"}]


LINES = f"""by = "regex_name"
['{LINEAR}']
name = "mxint"
"""
ERRORS = {
    "a policy": (LINES + "decode_policy = 'none'\ndecode = {bypass = true}", "4:17", "one of quantized, fp_only"),
    "a handoff": (LINES + "kv_cache_handoff = 'int4'\ndecode = {bypass = true}", "4:20", "one of fp, decode_format"),
    "no bucket": (LINES + "decode_policy = 'quantized'\nweight_width = 4", "4:1", "has neither 'prefill' nor 'decode'"),
    "a key beside": (LINES + "weight_width = 4\ndecode = {bypass = true}", "4:1", "unknown key 'weight_width'"),
    "a key inside": (LINES + f"['{LINEAR}'.decode]\nweight_with = 4", "5:1", "weight_with"),
}  # fmt: skip


@pytest.mark.parametrize("text, place, problem", ERRORS.values(), ids=ERRORS)
def test_buckets_that_cannot_be_are_one_error_at_their_line(text: str, place: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(problem)) as caught:
        pipeline(text)
    assert f"p.toml:{place}" in str(caught.value)


@pytest.mark.parametrize("stage, what", [("av_matmul", "probabilities"), ("qk_matmul", "queries")])
def test_what_is_rounded_inside_attention_is_refused_in_a_file_with_phases(stage: str, what: str) -> None:
    with pytest.raises(ConfigError, match=f"{what} of attention, which is spelled out"):
        of({"decode": {"kv_cache": KV, stage: KV}})
    with pytest.raises(ConfigError, match=f"{what} of attention, which is spelled out"):
        of(
            {
                **{
                    key: {"bypass": True}
                    for key in ("qk_matmul", "av_matmul", "kv_cache", "softmax", "rope", "qk_norm")
                },
                stage: KV,
            },
            {"decode": W4A8},
        )


def quantized(handoff: str, **gptq: object) -> EmittedCausalLM:
    selectors = {
        ATTENTION: {"config": {"name": "mxint", "kv_cache_handoff": handoff, "decode": {"kv_cache": KV}}},
        LINEAR: {"config": {"name": "mxint", "decode": W4A8}},
    }
    found, _ = quantize_module_transform_pass(model("llama-tiny"), {"by": "regex_name", **selectors, **gptq})
    return found


@pytest.mark.parametrize("handoff", ["fp", "decode_format"])
def test_a_decode_only_model_prefills_as_the_float_model_to_the_bit(handoff: str) -> None:
    """Mase: test_llama_decode_only_end_to_end, test_kv_handoff_decode_format_writes_quantised_prefill_cache."""
    lm, (ids, mask, _) = quantized(handoff), padded_batch()
    cache = lm.new_cache()
    torch.testing.assert_close(
        lm(ids, attention_mask=mask, past_key_values=cache).logits[mask.bool()],
        model("llama-tiny")(ids, attention_mask=mask).logits[mask.bool()],
        rtol=1e-5,
        atol=1e-5,
    )
    held = cache.storage.tensors["cache_0_keys"][:, :, : ids.shape[1]]
    # What is kept is float; what is rounded are codes.
    assert held.dtype == (torch.uint8 if handoff == "decode_format" else torch.float32)
    if handoff == "fp":
        assert not torch.equal(parse("mxint4@16/ceil").fake_quantize(held, axis=-1), held)
    assert lm.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False).shape[0] == 3
