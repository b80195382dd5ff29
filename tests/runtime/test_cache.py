"""Text through the cache: the same tokens as transformers', by every way that ``generate`` knows."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mxfx.export.artefact import load, save
from mxfx.formats import parse
from mxfx.graph.program import Program
from mxfx.graph.tiny import tiny
from mxfx.graph.trace import trace
from mxfx.ops import first_slots, keep_first_quantize
from mxfx.ops.cache import why_defined
from mxfx.passes.insert_kv_cache import InsertKvCache
from mxfx.rewrite.lowering import lower_calls
from mxfx.rewrite.rewriter import Rewriter
from mxfx.runtime.cache import CacheError, CacheOutOfMemory, KVCache, Storage, cache_bytes
from mxfx.runtime.causal_lm import EmittedCausalLM, as_causal_lm
from mxfx.runtime.decode import RecordedStep
from tests.programs import RAISE, config_a, model, padded_batch, passed, raised
from tests.runtime.feeding import steps

FAMILIES = (
    "llama-tiny",
    "qwen2-tiny",
    "qwen3-tiny",
    "mistral-tiny",
    "gemma-tiny",
    "gemma3-tiny",
    "phi3-tiny",
    "smollm3-tiny",
    "olmo2-tiny",
    "granite-tiny",
)
GREEDY = {"do_sample": False, "eos_token_id": None}


@cache
def emitted(family: str) -> EmittedCausalLM:
    return as_causal_lm(raised(family))


@cache
def quantized() -> Program:
    """W4 A4 KV4."""
    return passed(raised("llama-tiny"), config_a())


def prompts(count: int = 6, length: int = 20) -> dict[str, Tensor]:
    """Left-padded prompts of unequal length, int64 ``(count, length)``, and their mask."""
    ids = torch.randint(3, 128, (count, length), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(length)[None] >= (torch.arange(count) * 3 % length)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_transformers(family: str) -> None:
    options = {**prompts(), **GREEDY, "max_new_tokens": 40}
    assert torch.equal(emitted(family).generate(**options), model(family).generate(**options))


@pytest.mark.thorough
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_of_fifty_prompts_are_those_of_transformers(family: str) -> None:
    options = {**prompts(50, 40), **GREEDY, "max_new_tokens": 200}
    assert torch.equal(emitted(family).generate(**options), model(family).generate(**options))


@pytest.mark.parametrize("family", ["llama-tiny", "gemma3-tiny"])
@pytest.mark.parametrize(
    "way",
    [
        {"num_beams": 3},
        {"do_sample": True, "top_k": 5},
        {"do_sample": True, "num_return_sequences": 2},
        {"use_cache": False},
        {"prefill_chunk_size": 7},
    ],
    ids=str,
)
def test_every_way_to_generate_gives_the_tokens_of_transformers(family: str, way: dict) -> None:
    options = {**prompts(), **GREEDY, "max_new_tokens": 12, **way}
    found = []
    for one in (model(family), emitted(family)):
        torch.manual_seed(0)
        found.append(one.generate(**options))
    assert torch.equal(*found)


@pytest.mark.parametrize("family", ["llama-tiny", "mistral-tiny"])
@pytest.mark.parametrize("helper", ["assistant", "lookup"])
def test_assisted_generation_takes_back_what_was_refused(family: str, helper: str) -> None:
    ids = prompts()["input_ids"][:1].repeat(1, 2)
    help_ = {"assistant_model": emitted("qwen2-tiny")} if helper == "assistant" else {"prompt_lookup_num_tokens": 3}
    expected = model(family).generate(ids, **GREEDY, max_new_tokens=24)
    assert torch.equal(emitted(family).generate(ids, **GREEDY, max_new_tokens=24, **help_), expected)


@pytest.mark.parametrize("family", ["llama-tiny", "gemma3-tiny"])
def test_prefill_and_decode_give_the_logits_of_one_prefill(family: str) -> None:
    ids, mask, _ = padded_batch()
    whole = emitted(family)(ids, attention_mask=mask).logits
    for lengths in ([12, 1], [4, 9], [1] * 13, [7, 1, 1, 4]):
        pieces = steps(emitted(family), ids, mask, lengths)
        torch.testing.assert_close(pieces[mask.bool()], whole[mask.bool()], rtol=1e-5, atol=1e-5)


def test_a_packed_cache_gives_the_bits_of_a_rounded_one(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = as_causal_lm(quantized())
    monkeypatch.setattr("mxfx.passes.insert_kv_cache.stores", lambda fmt: False)
    plain = as_causal_lm(quantized())
    ids, mask, _ = padded_batch()
    dtypes = [{spec.dtype for spec in lm.specs} for lm in (packed, plain)]
    assert dtypes == [{torch.uint8}, {torch.float32}]
    for lengths in ([12, 1], [1] * 13, [6, 3, 1, 3]):
        assert torch.equal(steps(packed, ids, mask, lengths), steps(plain, ids, mask, lengths))


def behind(first: int, family: str = "llama-tiny") -> Program:
    """W4 A4 KV4, the first tokens of a text not rounded."""
    *others, cached = config_a()
    return passed(raised(family), (*others, replace(cached, keep_first=first)))


@pytest.mark.parametrize("family", ["llama-tiny", "mistral-tiny"])
def test_first_tokens_that_are_kept_have_the_bits_of_a_rounded_cache_with_the_same_rule(family, monkeypatch) -> None:
    """Under padding too, beyond the window of a ring, and where a call ends among the first tokens."""
    packed = as_causal_lm(behind(3, family))
    monkeypatch.setattr("mxfx.passes.insert_kv_cache.stores", lambda fmt: False)
    plain = as_causal_lm(behind(3, family))
    ids, mask, _ = padded_batch()
    whole = packed(ids, attention_mask=mask).logits
    assert not torch.equal(whole, as_causal_lm(behind(0, family))(ids, attention_mask=mask).logits)
    for lengths in ([12, 1], [1] * 13, [6, 3, 1, 3], [2, 11]):
        found = steps(packed, ids, mask, lengths)
        assert torch.equal(found, steps(plain, ids, mask, lengths))
        torch.testing.assert_close(found[mask.bool()], whole[mask.bool()], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("first", [0, 3])
def test_what_computes_a_step_of_decoding_is_told(first: int) -> None:
    program = passed(behind(first), (InsertKvCache(),))
    for device, by in (("cpu", "attend_token"), ("meta", None)):
        rw = Rewriter(program.copy(), "lower")
        lower_calls(rw, torch.device(device))
        told = [row for row in rw.record.details["providers"] if row["op"] == "a step of cached_attention"]
        assert [row["path"] for row in told] == [f"model.layers.{layer}.self_attn" for layer in range(2)]
        assert {row["provider"] for row in told} == {None if first else by}
        (reason,) = {row["reason"] for row in told}
        assert "first tokens are kept" in reason if first else reason == ("" if by else "no kernel for meta")


def test_a_sink_for_each_query_is_told_to_be_computed_by_the_definition() -> None:
    q, k = torch.zeros(1, 4, 1, 16), torch.zeros(1, 2, 1, 16)
    reasons = (
        why_defined(q, k, k, None, None, sinks, None, None, False, torch.device("meta"))
        for sinks in (torch.zeros(1, 4, 1, 1), torch.zeros(4))
    )
    assert list(reasons) == ["each query has a sink of its own", "no kernel for meta"]


def test_what_is_kept_counts_from_the_first_real_token_and_in_the_memory_of_the_cache() -> None:
    x = torch.randn(2, 2, 7, 32, generator=torch.Generator().manual_seed(0))
    starts = first_slots(x[:, 0, :, 0], torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1]]))
    found, rounded = keep_first_quantize(x, starts, None, 3, "mxint4@32"), parse("mxint4@32").fake_quantize(x)
    for text, kept in enumerate(([0, 1, 2], [2, 3, 4])):
        others = [place for place in range(7) if place not in kept]
        assert torch.equal(found[text][:, kept], x[text][:, kept])
        assert torch.equal(found[text][:, others], rounded[text][:, others])
    kept, without = (as_causal_lm(behind(first)).specs for first in (3, 0))
    more = cache_bytes(kept, 5, 100) - cache_bytes(without, 5, 100)
    assert more == cache_bytes(kept, 5, 900) - cache_bytes(without, 5, 900) == 5 * 2 * 2 * 3 * 2 * 16 * 4


def test_a_cache_that_keeps_first_tokens_grows_and_goes_on() -> None:
    lm = as_causal_lm(behind(3))
    ids = torch.randint(3, 128, (2, 90), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    torch.testing.assert_close(steps(lm, ids, mask, [60, 1, 29]), lm(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_cache_is_continued_by_generate() -> None:
    lm, ids = emitted("llama-tiny"), prompts()["input_ids"][:1]
    first = lm.generate(ids, **GREEDY, max_new_tokens=6, return_dict_in_generate=True)
    again = lm.generate(first.sequences, **GREEDY, max_new_tokens=6, past_key_values=first.past_key_values)
    assert torch.equal(again, model("llama-tiny").generate(ids, **GREEDY, max_new_tokens=12))


def test_a_ring_takes_no_more_than_its_window_and_cannot_be_cropped() -> None:
    lm = emitted("mistral-tiny")
    held = lm.new_cache()
    lm(prompts()["input_ids"], past_key_values=held)
    assert held.nbytes == cache_bytes(lm.specs, 6, 20) == cache_bytes(lm.specs, 6, 5)
    with pytest.raises(CacheError, match="the ring cache_0_keys only the last 5"):
        held.crop(-1)


def test_a_cache_that_records_its_past_can_be_cropped() -> None:
    lm = emitted("mistral-tiny")
    ids = prompts()["input_ids"]
    held = lm.new_cache()
    lm(ids[:, :9], past_key_values=held)
    held.activate_past_recording()
    lm(ids[:, 9:15], past_key_values=held)
    held.crop(-3)
    after = lm(ids[:, 12:], past_key_values=held).logits
    torch.testing.assert_close(after, lm(ids).logits[:, 12:], rtol=1e-5, atol=1e-5)


def test_another_batch_another_mask_and_a_foreign_cache_are_refused() -> None:
    lm, ids = emitted("llama-tiny"), prompts()["input_ids"]
    held = lm.new_cache()
    lm(ids, past_key_values=held)
    with pytest.raises(CacheError, match="the cache holds 6 texts, the call has 2"):
        lm(ids[:2], past_key_values=held)
    with pytest.raises(ValueError, match=r"= \(6, 40\), .*not \(6, 20\)"):
        lm(ids, attention_mask=torch.ones_like(ids), past_key_values=held)
    with pytest.raises(CacheError, match="expected a cache of this model"):
        emitted("gemma3-tiny")(ids, past_key_values=held)
    with pytest.raises(CacheError, match="cache_implementation='static'"):
        lm.generate(ids, cache_implementation="static", max_new_tokens=2)


def test_a_cache_too_large_is_one_error_and_the_model_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, ids = emitted("llama-tiny"), prompts()["input_ids"]
    held = lm.new_cache()
    before = lm(ids[:, :19], past_key_values=held).logits
    with pytest.raises(
        CacheOutOfMemory, match=r"no memory on cpu for a cache of .* GB \(6 × 1,000,000,000,000 tokens\)"
    ):
        Storage.make(lm.specs, 6, 10**12, True, torch.device("cpu"))
    room = held.storage.room if held.storage is not None else 0
    monkeypatch.setattr("mxfx.runtime.cache._STEP", 10**12)
    with pytest.raises(CacheOutOfMemory):
        lm(ids[:, :1].expand(6, room), past_key_values=held)
    assert held.get_seq_length() == 19
    last = lm(ids[:, 19:], past_key_values=held).logits
    torch.testing.assert_close(torch.cat((before, last), 1), lm(ids).logits, rtol=1e-5, atol=1e-5)


def test_logits_to_keep_tuples_and_the_number_of_items_are_honoured() -> None:
    lm, ids = emitted("llama-tiny"), prompts()["input_ids"]
    whole = lm(ids).logits
    assert torch.equal(lm(ids, logits_to_keep=3).logits, whole[:, -3:])
    assert torch.equal(lm(ids, logits_to_keep=torch.tensor([1, 4])).logits, whole[:, [1, 4]])
    assert torch.equal(lm(ids, logits_to_keep=25).logits, whole)
    with pytest.raises(ValueError, match=r"indices of tokens \(kept,\), not \(1, 2\)"):
        lm(ids, logits_to_keep=torch.tensor([[1, 4]]))
    assert torch.equal(lm(ids, return_dict=False)[0], whole)
    expected = model("llama-tiny")(ids, labels=ids, num_items_in_batch=7).loss
    torch.testing.assert_close(lm(ids, labels=ids, num_items_in_batch=7).loss, expected)


@pytest.mark.parametrize("kept", [1, 7, torch.tensor([0, 3, -1])], ids=str)
@pytest.mark.parametrize("family", ["llama-tiny", "gemma3-tiny"])
def test_logits_that_are_kept_are_those_of_transformers_with_and_without_a_cache(family: str, kept) -> None:
    lm, given = emitted(family), prompts()
    expected = model(family)(**given, logits_to_keep=kept).logits
    for held in (None, lm.new_cache()):
        found = lm(**given, logits_to_keep=kept, past_key_values=held).logits
        real = given["attention_mask"][:, -kept:] if isinstance(kept, int) else given["attention_mask"][:, kept]
        torch.testing.assert_close(found[real.bool()], expected[real.bool()], rtol=1e-5, atol=1e-5)


def test_what_a_graph_cannot_do_is_refused_by_name(tmp_path: Path) -> None:
    lm, ids = emitted("llama-tiny"), prompts()["input_ids"]
    with pytest.raises(TypeError, match="cannot honour output_attentions=True"):
        lm(ids, output_attentions=True)
    assert lm(ids, output_attentions=False).logits is not None
    for change in (lambda: lm.to(torch.bfloat16), lambda: lm.half(), lambda: lm.to("cpu", torch.float64)):
        with pytest.raises(TypeError, match=r"lowered for torch.float32"):
            change()
    assert lm.to("cpu") is lm and lm.float() is lm
    with pytest.raises(TypeError, match="save_pretrained would write"):
        lm.save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())
    with pytest.raises(TypeError, match="vocabulary of one size"):
        lm.resize_token_embeddings(200)


def test_how_a_model_generates_survives_trace_and_artefact(tmp_path: Path) -> None:
    source = tiny("llama-tiny")
    source.generation_config.eos_token_id = [2, 77]
    source.generation_config.update(temperature=0.6, top_k=9, do_sample=True)
    program = passed(trace(source), RAISE)
    save(program, tmp_path / "model")
    for one in (program, load(tmp_path / "model")):
        found = as_causal_lm(one).generation_config
        assert (found.eos_token_id, found.temperature, found.top_k, found.do_sample) == ([2, 77], 0.6, 9, True)


def test_only_who_asks_gets_a_cache() -> None:
    lm, ids = emitted("llama-tiny"), prompts()["input_ids"]
    assert lm(ids).past_key_values is None
    assert isinstance(lm(ids, use_cache=True).past_key_values, KVCache)


def test_a_storage_that_is_gone_frees_its_memory_at_once() -> None:
    """No collection runs because a GPU is full: a recorded step must not form a ring with what it was made for."""
    lm = emitted("llama-tiny")
    storage = Storage.make(lm.specs, 2, 8, True, torch.device("cpu"))
    storage.attached["step"] = RecordedStep(lm.graph, storage)
    left = weakref.ref(next(iter(storage.tensors.values())))
    gc.disable()
    try:
        del storage
        assert left() is None
    finally:
        gc.enable()
