"""Prefill and decode as two programs over one cache: what is handed over, what runs when, what a folder holds."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mxfx.export.artefact import load, save
from mxfx.formats import Format, parse
from mxfx.graph.phases import PhaseError, joined
from mxfx.graph.program import Program
from mxfx.passes import Annotate, ExpandAttention, Rule
from mxfx.rewrite import Selector
from mxfx.runtime.cache import cache_bytes
from mxfx.runtime.causal_lm import EmittedCausalLM, as_causal_lm
from mxfx.runtime.stepwise import Stepwise
from tests.programs import ATTENTION, MXINT4, config_a, padded_batch, passed, raised
from tests.runtime.feeding import steps

INT8 = parse("mxint8@32")
#: What a prefill may be, beside a decode in W4 A4 KV4.
PREFILLS = {
    "float": (),
    "A8 KV8": config_a(activation=INT8, kv=INT8),
    "A8 KV16": config_a(activation=INT8, kv=None),
    "A8 KV4": config_a(activation=INT8),
}
GREEDY = {"do_sample": False, "eos_token_id": None}


@cache
def programs(prefill: str, family: str = "llama-tiny") -> tuple[Program, Program]:
    return passed(raised(family), PREFILLS[prefill]), passed(raised(family), config_a())


@cache
def phased(prefill: str, handoff: str, family: str = "llama-tiny") -> EmittedCausalLM:
    return as_causal_lm(joined(*programs(prefill, family), handoff))


@cache
def in_numbers(prefill: str) -> list[EmittedCausalLM]:
    """Both models by themselves, with caches that hold numbers, whatever grid these lie on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mxfx.passes.insert_kv_cache.stores", lambda fmt: False)
        return [as_causal_lm(program) for program in programs(prefill)]


def by_hand(prefill: str, ids: Tensor, mask: Tensor, prompt: int, onto: Format | None) -> Tensor:
    """Logits of prefill and steps out of two models that know nothing of each other.

    ``onto`` is what the prefill's keys and values are rounded to between them. The steps read numbers, not codes.
    """
    first, second = in_numbers(prefill)
    theirs, mine = first.new_cache(), second.new_cache()
    parts = [first(ids[:, :prompt], attention_mask=mask[:, :prompt], past_key_values=theirs).logits]
    mine.reserve(len(ids), prompt)
    for name, tensor in theirs.storage.tensors.items():
        rows = tensor[:, :, :prompt]
        mine.storage.tensors[name][:, :, :prompt] = rows if onto is None else onto.fake_quantize(rows, axis=-1)
    mine.length = prompt
    for at in range(prompt, ids.shape[1]):
        parts.append(second(ids[:, at : at + 1], attention_mask=mask[:, : at + 1], past_key_values=mine).logits)
    return torch.cat(parts, 1)


@pytest.mark.parametrize("handoff", ["keep", "requantize"])
@pytest.mark.parametrize("prefill", PREFILLS)
@pytest.mark.parametrize("prompt", [1, 9])
def test_a_prefill_and_steps_have_the_bits_of_two_models_and_a_handoff(prefill: str, handoff: str, prompt: int) -> None:
    ids, mask, _ = padded_batch()
    onto = None if handoff == "keep" or prefill == "A8 KV4" else MXINT4
    expected = by_hand(prefill, ids, mask, prompt, onto)
    found = steps(phased(prefill, handoff), ids, mask, [prompt] + [1] * (13 - prompt))
    assert torch.equal(found, expected)
    # They are two programs indeed.
    assert not torch.equal(steps(in_numbers(prefill)[1], ids, mask, [prompt] + [1] * (13 - prompt)), expected)


def test_a_prefill_in_pieces_sees_of_earlier_pieces_what_the_cache_holds_of_them() -> None:
    """By hand: the prefill's model, its cache filled anew with what decode's cache keeps after each piece."""
    ids, mask, _ = padded_batch()
    found = steps(phased("A8 KV8", "requantize"), ids, mask, [5, 4, 1, 3])
    theirs, mine = in_numbers("A8 KV8")
    held_, parts, start = mine.new_cache(), [], 0
    for length in (5, 4, 1, 3):
        stop = start + length
        lm = mine if length == 1 else theirs
        given = lm.new_cache()
        given.reserve(len(ids), stop)
        for name, tensor in given.storage.tensors.items():
            if start:
                rows = held_.storage.tensors[name][:, :, :start]
                tensor[:, :, :start] = rows if lm is mine else INT8.fake_quantize(rows, axis=-1)
        given.length = start
        parts.append(lm(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=given).logits)
        held_.reserve(len(ids), length)
        for name, tensor in held_.storage.tensors.items():
            rows = given.storage.tensors[name][:, :, start:stop]
            tensor[:, :, start:stop] = rows if lm is mine else MXINT4.fake_quantize(rows, axis=-1)
        held_.length = start = stop
    assert torch.equal(found, torch.cat(parts, 1))


def test_a_window_hands_over_its_last_tokens() -> None:
    """A ring of 5: a prompt that is longer, and steps beyond it, have the tokens of a cache that keeps everything."""
    ids, mask, _ = padded_batch()
    lm = phased("A8 KV8", "requantize", "mistral-tiny")
    whole, ring = lm.new_cache(), lm.new_cache()
    whole.activate_past_recording()
    parts = []
    for held_ in (whole, ring):
        found = [lm(ids[:, :9], attention_mask=mask[:, :9], past_key_values=held_).logits]
        for at in range(9, 13):
            found.append(lm(ids[:, at : at + 1], attention_mask=mask[:, : at + 1], past_key_values=held_).logits)
        parts.append(torch.cat(found, 1)[mask.bool()])
    torch.testing.assert_close(parts[0], parts[1], rtol=1e-5, atol=1e-5)
    assert ring.nbytes < whole.nbytes


def test_a_cache_of_both_takes_what_decode_stores_or_numbers() -> None:
    alone = as_causal_lm(programs("A8 KV8")[1]).specs
    assert phased("A8 KV8", "requantize").specs == alone
    assert {one.dtype for one in phased("A8 KV8", "keep").specs} == {torch.float32}
    assert phased("A8 KV4", "keep").specs == phased("A8 KV4", "requantize").specs == alone
    assert cache_bytes(alone, 1, 64) * 7 < cache_bytes(phased("A8 KV8", "keep").specs, 1, 64)


def test_a_call_without_a_cache_is_a_prefill_unless_it_is_told_otherwise() -> None:
    ids, mask, _ = padded_batch()
    first, second = (as_causal_lm(one) for one in programs("A8 KV8"))
    lm = phased("A8 KV8", "requantize")
    assert torch.equal(lm(ids, attention_mask=mask).logits, first(ids, attention_mask=mask).logits)
    assert torch.equal(lm(ids, attention_mask=mask, phase="decode").logits, second(ids, attention_mask=mask).logits)
    assert torch.equal(Stepwise(lm)(ids, mask).logits, Stepwise(second)(ids, mask).logits)


@pytest.mark.parametrize("handoff", ["keep", "requantize"])
def test_generate_is_prefill_and_steps(handoff: str) -> None:
    lm = phased("A8 KV8", handoff)
    ids, mask, _ = padded_batch()
    written = lm.generate(ids, attention_mask=mask, **GREEDY, max_new_tokens=8)
    held_, mask_, text = lm.new_cache(), mask, ids
    logits = lm(ids, attention_mask=mask, past_key_values=held_).logits
    for _ in range(8):
        text = torch.cat((text, logits[:, -1:].argmax(-1)), 1)
        mask_ = torch.cat((mask_, torch.ones_like(mask_[:, :1])), 1)
        logits = lm(text[:, -1:], attention_mask=mask_, past_key_values=held_).logits
    assert torch.equal(written, text)
    beams = lm.generate(ids, attention_mask=mask, **GREEDY, max_new_tokens=8, num_beams=3)
    assert beams.shape == written.shape


@pytest.mark.parametrize("handoff", ["keep", "requantize"])
def test_a_saved_model_opens_with_both_programs_and_each_weight_once(handoff: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from mxfx.export.folder import save_folder

    ids, mask, _ = padded_batch()
    program = joined(*programs("A8 KV8"), handoff)
    alone = programs("A8 KV8")[1]
    save_folder(program, tmp_path / "two")
    save_folder(alone, tmp_path / "one")
    two, one = ((tmp_path / name / "weights.safetensors").stat().st_size for name in ("two", "one"))
    assert two == one, "weights of both phases agree: they are stored once"
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "two")
    expected = steps(phased("A8 KV8", handoff), ids, mask, [9, 1, 1, 1, 1])
    assert torch.equal(steps(lm, ids, mask, [9, 1, 1, 1, 1]), expected)
    lm.save_pretrained(tmp_path / "again")
    for file in (tmp_path / "two").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name
    shared = {id(p) for p in lm.graph.parameters()} & {id(p) for p in lm.decode_graph.parameters()}
    assert len(shared) == len(list(lm.graph.parameters())) == len(list(lm.decode_graph.parameters()))


def test_weights_that_differ_are_stored_twice_and_no_others(tmp_path: Path) -> None:
    program = joined(*programs("float"), "requantize")
    save(program, tmp_path)
    opened = load(tmp_path)
    assert opened.phases is not None
    other = [name for name in program.weights if opened.phases.decode.weights[name] is not opened.weights[name]]
    assert other and all("_proj" in name for name in other)
    assert sorted(other) == sorted(name for name in program.weights if "_proj" in name)


def test_a_damaged_folder_is_one_error(tmp_path: Path) -> None:
    from mxfx.export.artefact import ArtefactError

    save(joined(*programs("A8 KV8"), "keep"), tmp_path)
    manifest = tmp_path / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"keep"', '"drop"'))
    with pytest.raises(ArtefactError, match="no handoff 'drop'; expected keep or requantize"):
        load(tmp_path)
    manifest.write_text(text)
    (tmp_path / "decode.mxir").unlink()
    with pytest.raises(ArtefactError, match=r"decode\.mxir: is missing"):
        load(tmp_path)
    save(programs("A8 KV8")[0], tmp_path)
    assert load(tmp_path).phases is None


def test_programs_of_which_no_cache_goes_over_are_refused() -> None:
    first, second = programs("float")
    spelled = passed(raised("llama-tiny"), (Annotate(rule=(Rule(Selector(ATTENTION), probs=INT8),)), ExpandAttention()))
    with pytest.raises(PhaseError, match="prefill has 2 attentions that a cache can serve, decode has 0"):
        joined(first, spelled, "keep")
    with pytest.raises(PhaseError, match="no handoff 'fp'; expected keep or requantize"):
        joined(first, second, "fp")


def test_another_phase_is_refused() -> None:
    with pytest.raises(ValueError, match="phase is 'Decode', expected one of prefill, decode"):
        as_causal_lm(raised("llama-tiny"))(torch.ones(1, 4, dtype=torch.int64), phase="Decode")
