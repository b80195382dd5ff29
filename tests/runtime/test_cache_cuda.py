"""Decoding on a CUDA device: recorded steps, kernels over packed caches, storages that serve again."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from mxfx.formats import parse
from mxfx.formats.stored import codes_length, scales_length
from mxfx.graph.tiny import tiny
from mxfx.graph.trace import trace
from mxfx.ops.cache import write_cache
from mxfx.pipeline.emit import emitted
from mxfx.runtime.causal_lm import EmittedCausalLM, as_causal_lm
from tests.programs import RAISE, config_a, passed

pytestmark = pytest.mark.cuda
FORMATS = ("mxint4@32/mse", "mxint8@16", "mxfp4_e2m1@16/ceil", "mxfp8_e4m3@32", "mxfp8_e5m2@32", None)


@cache
def model(family: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return tiny(family, dtype=dtype, hidden_size=128, head_dim=32).cuda()


@cache
def lm(family: str, dtype: torch.dtype = torch.float32, quantized: bool = False) -> EmittedCausalLM:
    program = passed(trace(model(family, dtype)), RAISE)
    program = passed(program, config_a()) if quantized else program
    return as_causal_lm(emitted(program, "cuda"), "cuda")


def prompts(count: int = 6, length: int = 20) -> dict[str, Tensor]:
    ids = torch.randint(3, 128, (count, length), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(length)[None] >= (torch.arange(count) * 3 % length)[:, None]).long()
    return {"input_ids": (ids * mask).cuda(), "attention_mask": mask.cuda()}


@pytest.mark.parametrize("family", ["llama-tiny", "mistral-tiny", "gemma3-tiny", "qwen3-tiny"])
def test_greedy_tokens_are_those_of_transformers(family: str) -> None:
    for options in ({}, {"num_beams": 3}):
        given = {**prompts(), **options, "do_sample": False, "eos_token_id": None, "max_new_tokens": 40}
        assert torch.equal(lm(family).generate(**given), model(family).generate(**given)), options


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
def test_steps_give_the_logits_of_one_prefill(quantized: bool, dtype: torch.dtype, tolerance: float) -> None:
    one, given = lm("llama-tiny", dtype, quantized), prompts()
    ids, mask = given["input_ids"], given["attention_mask"]
    whole = one(ids, attention_mask=mask).logits
    held = one.new_cache()
    parts = [one(ids[:, :9], attention_mask=mask[:, :9], past_key_values=held).logits]
    for at in range(9, 20):
        parts.append(one(ids[:, at : at + 1], attention_mask=mask[:, : at + 1], past_key_values=held).logits)
    real = mask.bool()
    error = (torch.cat(parts, 1) - whole)[real].norm() / whole[real].norm()
    # Under a quantizer a last bit can move a code.
    assert error < (0.1 if quantized else tolerance), error


@pytest.mark.parametrize("text", FORMATS)
def test_tokens_are_stored_to_the_bits_of_the_definition(text: str | None) -> None:
    from mxfx.ops.kernels.cache_rows_triton import write_tokens

    fmt = None if text is None else parse(text)
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.randn(2, 3, 50, 64, device="cuda") * torch.randn(2, 3, 50, 1, device="cuda").mul(9).exp2()
        x[0, 0, 0], x[0, 0, 1], x[1, 1, 2, :2] = 0.0, -0.0, torch.tensor([-7.9, 3.0], device="cuda")
        x[0, 0, 3, 5] = float("nan") if text else 0.0
        x = x.to(dtype) if fmt is None else fmt.fake_quantize(x.to(dtype))
        slots, found = torch.arange(4, 54, device="cuda"), []
        for write in (write_tokens, None):
            tensors: list[Tensor | None] = [torch.zeros(2, 3, 53, 64, dtype=dtype, device="cuda"), None]
            if fmt is not None:
                widths = (codes_length(64, fmt), scales_length(64, fmt))
                tensors = [torch.zeros(2, 3, 53, width, dtype=torch.uint8, device="cuda") for width in widths]
            if write is None:
                write_cache(tensors[0], tensors[1], x, slots, fmt)
            else:
                other = [None if t is None else t.clone() for t in tensors]
                write((tensors[0], other[0], tensors[1], other[1]), x, x, slots, fmt, fmt)
            found.append([t for t in tensors if t is not None])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_storage_and_its_recording_serve_the_next_cache() -> None:
    one = lm("llama-tiny")
    given = {**prompts(), "do_sample": False, "eos_token_id": None, "max_new_tokens": 8}
    first = one.generate(**given)
    (kept,) = one._storages
    again = one.generate(**given)
    assert torch.equal(first, again) and one._storages == [kept]


def test_assisted_generation_crops_what_was_recorded() -> None:
    ids = prompts()["input_ids"][:1].repeat(1, 2)
    given = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 24}
    expected = lm("mistral-tiny").generate(ids, **given)
    assert torch.equal(lm("mistral-tiny").generate(ids, **given, prompt_lookup_num_tokens=3), expected)
