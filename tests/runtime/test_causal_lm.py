"""The emitted graph as a model of transformers: logits, loss, generation, what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Mamba2Config, PreTrainedModel

from mxfx.calibration.estimate import LiveBytes
from mxfx.export.artefact import load, save
from mxfx.export.plain import source_config
from mxfx.graph.module import build
from mxfx.graph.program import Program
from mxfx.ops.kernels import limits
from mxfx.passes import FuseActivationQuant, FuseHadamardQuant, FuseNormQuant, FuseRopeQuant, TransformKv
from mxfx.pipeline.emit import emitted as lower
from mxfx.rewrite import Context, apply
from mxfx.runtime.cache import CacheError
from mxfx.runtime.causal_lm import EmittedCausalLM, as_causal_lm, configs_of, emit
from tests.passes.fusing import quantized
from tests.programs import config_a, model, padded_batch, passed, raised

FUSIONS = (FuseHadamardQuant(), FuseNormQuant(), FuseActivationQuant(), FuseRopeQuant())


@pytest.fixture(scope="module")
def emitted() -> EmittedCausalLM:
    return as_causal_lm(raised("llama-tiny"))


def test_logits_are_those_of_the_graph(emitted: EmittedCausalLM) -> None:
    ids, mask, positions = padded_batch()
    graph = emit(raised("llama-tiny"))
    assert torch.equal(emitted(ids).logits, graph(ids))
    assert torch.equal(emitted(input_ids=ids, attention_mask=mask).logits, graph(ids, None, mask))
    assert torch.equal(emitted(ids, mask, positions).logits, graph(ids, positions, mask))


def test_the_loss_is_that_of_the_model(emitted: EmittedCausalLM) -> None:
    ids, mask, positions = padded_batch()
    # What a padding token predicts is nobody's business: the first real token is no label.
    labels = ids.masked_fill(positions == 0, -100)
    with torch.no_grad():
        expected = model("llama-tiny")(ids, attention_mask=mask, position_ids=positions, labels=labels).loss
    assert torch.equal(emitted(ids, mask, labels=labels).loss, expected)
    assert emitted(ids).loss is None


@pytest.mark.parametrize("beams", [1, 2])
def test_it_generates_what_the_model_generates(emitted: EmittedCausalLM, beams: int) -> None:
    ids, mask, _ = padded_batch()
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "num_beams": beams}
    expected = model("llama-tiny").generate(ids, **options)
    assert torch.equal(emitted.generate(ids, **options), expected)


def test_in_pieces_it_gives_the_bits_of_the_whole(emitted: EmittedCausalLM) -> None:
    pieces = as_causal_lm(raised("llama-tiny"), whole=False)
    assert not list(pieces.parameters())
    assert (pieces.device.type, pieces.dtype) == ("cpu", torch.float32)
    ids, mask, positions = padded_batch()
    assert torch.equal(pieces(ids).logits, emitted(ids).logits)
    assert torch.equal(pieces(ids, mask, positions).logits, emitted(ids, mask, positions).logits)
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(pieces.generate(ids, **options), emitted.generate(ids, **options))


def test_in_pieces_only_weights_at_hand_are_in_the_dtype_of_the_run() -> None:
    program = lower(raised("llama-tiny"))
    program.weights = program.weights.cast(torch.bfloat16)
    program.dtype = torch.float32
    ids, _, _ = padded_batch()
    whole = sum(4 * tensor.numel() for tensor in program.weights.values())
    with LiveBytes() as live:
        as_causal_lm(program, whole=False)(ids)
    with LiveBytes() as built:
        kept = build(program)
    assert built.peak > 0.9 * whole and kept is not None
    assert live.peak < 0.6 * whole


def test_it_has_what_lm_eval_asks_of_a_model(emitted: EmittedCausalLM) -> None:
    assert isinstance(emitted, PreTrainedModel)
    assert emitted.config.model_type == "llama" and emitted.config.vocab_size == 128
    assert (emitted.device.type, emitted.dtype, emitted.training) == ("cpu", torch.float32, False)


@pytest.mark.parametrize("family", ["qwen3-tiny", "gemma3-tiny", "mistral-tiny"])
def test_every_configuration_survives_the_way_through_the_program(family: str) -> None:
    rebuilt = as_causal_lm(raised(family)).config
    for key in ("hidden_size", "num_hidden_layers", "sliding_window", "eos_token_id"):
        assert getattr(rebuilt, key, None) == getattr(model(family).config, key, None), key


def test_a_cache_or_embeddings_are_refused(emitted: EmittedCausalLM) -> None:
    ids, _, _ = padded_batch()
    with pytest.raises(CacheError, match=r"expected a cache of this model .*, got object"):
        emitted(ids, past_key_values=object())
    with pytest.raises(TypeError, match="cannot honour inputs_embeds=Tensor"):
        emitted(ids, inputs_embeds=torch.zeros(1))


def test_a_lowered_program_is_not_lowered_again() -> None:
    program = lower(raised("llama-tiny"))
    assert lower(program) is program


def quantized_kv(bits: str | None) -> Program:
    from mxfx.formats import parse

    return passed(raised("llama-tiny"), config_a(kv=None if bits is None else parse(bits)))


def test_a_cache_in_four_bits_changes_the_logits_of_the_prefill() -> None:
    ids, _, _ = padded_batch()
    free, four, eight = (as_causal_lm(quantized_kv(bits))(ids).logits for bits in (None, "mxint4@16", "mxint8@16"))
    assert not torch.equal(free, four)
    assert (free - eight).norm() < (free - four).norm()


def kernels(program: Program) -> list[str]:
    """Names of the kernels that a lowered program calls, in order."""
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    return [target.split(".")[1] for target in targets if target.startswith("mxfx_kernels.")]


@pytest.fixture
def triton_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "has_triton", lambda: True)


def same_logits(a: Program, b: Program) -> bool:
    ids, mask, _ = padded_batch()
    with torch.no_grad():
        return torch.equal(build(a)(ids, None, mask), build(b)(ids, None, mask))


@pytest.mark.parametrize("transforms", [False, True])
def test_on_a_gpu_quantizers_are_fused_with_what_they_round(transforms: bool, triton_is_there: None) -> None:
    program = quantized(raised("llama-tiny"), Context(), transforms=transforms)
    on_gpu = lower(program, "cuda")
    # The norms' and the activation's quantizers, the key's; where no Hadamard turns heads, fuse-heads has taken it in.
    layer = ["norm_quantize", *(["rope_quantize"] if transforms else []), "norm_quantize", "silu_mul_quantize"]
    assert [name for name in kernels(on_gpu) if name in layer] == 2 * layer
    # No kernel runs on a CPU: the definitions give what a program that is lowered for it gives.
    assert same_logits(on_gpu, lower(program))


def test_fusing_happens_once_and_only_where_something_is_quantized(triton_is_there: None) -> None:
    program = quantized(raised("llama-tiny"), Context(), transforms=True)
    for one in FUSIONS:
        program = apply(one, program).program
    assert kernels(lower(program, "cuda")) == kernels(
        lower(quantized(raised("llama-tiny"), Context(), transforms=True), "cuda")
    )
    assert not any("quantize" in name for name in kernels(lower(raised("llama-tiny"), "cuda")))


def test_what_no_kernel_serves_is_split_again() -> None:
    """Without Triton a fused program is lowered as if it had never been fused."""
    program = quantized(raised("llama-tiny"), Context(), transforms=True)
    fused = program
    for one in FUSIONS:
        fused = apply(one, fused).program
    targets = [[str(n.target) for n in lower(p).graph.nodes if n.op == "call_function"] for p in (program, fused)]
    assert sorted(targets[0]) == sorted(targets[1])
    assert same_logits(lower(program), lower(fused))


def test_a_saved_program_is_lowered_to_the_same_bits(tmp_path: Path, triton_is_there: None) -> None:
    program = quantized(raised("llama-tiny"), Context(), transforms=True)
    save(program, tmp_path / "model")
    assert same_logits(lower(load(tmp_path / "model"), "cuda"), lower(program, "cuda"))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_matrices_for_every_head_compile_as_one_graph(device: str) -> None:
    torch._dynamo.reset()
    ids, mask, _ = padded_batch()
    ctx = Context(tokens=lambda: ids)
    program = apply(TransformKv(kind="wush", block=8), raised("llama-tiny"), ctx).program
    module = build(lower(quantized(program, ctx, transforms=False), device))
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(ids, None, mask), module(ids, None, mask))


def test_a_mask_of_another_shape_is_refused(emitted: EmittedCausalLM) -> None:
    ids, _, _ = padded_batch()
    with pytest.raises(
        ValueError, match=r"attention_mask is .* = \(3, 13\), 1 for each real token, not \(3, 1, 13, 13\)"
    ):
        emitted(ids, attention_mask=torch.ones(3, 1, 13, 13, dtype=torch.int64))


def test_a_configuration_that_holds_infinity_is_read_back() -> None:
    """As Mamba 2's ``time_step_limit``; JSON has no infinity."""
    program = raised("llama-tiny").copy()
    values = json.loads(Mamba2Config(num_heads=8, head_dim=16, hidden_size=64).to_json_string(use_diff=False))
    program.source = replace(program.source, config=values)
    for config in (configs_of(program)[0], source_config(program)):
        assert tuple(config.time_step_limit) == (0.0, float("inf"))
