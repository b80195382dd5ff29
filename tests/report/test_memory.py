"""What a program holds on its device, by kind."""

from __future__ import annotations

import torch

from mxfx.config import EmitConfig
from mxfx.graph.module import build
from mxfx.graph.tiny import tiny
from mxfx.graph.trace import trace
from mxfx.passes import Annotate, PackWeights
from mxfx.pipeline.emit import emitted
from mxfx.report.memory import memory
from mxfx.rewrite.size import bits_per_weight
from tests.programs import RAISE, config_a, passed, raised


def test_stored_bytes_are_those_of_the_module_that_is_built() -> None:
    program = passed(raised("llama-tiny"), config_a()).twin(torch.bfloat16)
    for settings in (EmitConfig(), EmitConfig(packed=False), EmitConfig(device="cuda")):
        lowered = emitted(program, "cpu", settings)
        module = build(lowered)
        held = {id(t): t.nbytes for t in (*module.parameters(), *module.buffers())}
        assert memory(lowered).stored == sum(held.values())


def test_packed_weights_take_four_bits_and_a_quarter() -> None:
    program = passed(raised("llama-tiny"), config_a()).twin(torch.bfloat16)
    plain, packed = (memory(emitted(program, "cuda", EmitConfig(packed=yes))) for yes in (False, True))
    moved = plain.weights - packed.weights
    assert packed.codes + packed.scales == moved * 4.25 / 16 and plain.codes == plain.scales == 0
    # The largest decoder weight, decoded to bfloat16.
    assert packed.scratch == 64 * 96 * 2 and plain.scratch == 0


def test_an_annotated_program_counts_as_it_will_be_packed() -> None:
    rounded = passed(raised("llama-tiny"), config_a()).twin(torch.bfloat16)
    annotated = passed(raised("llama-tiny"), (p for p in config_a() if isinstance(p, Annotate))).twin(torch.bfloat16)
    packed = passed(rounded, (PackWeights(),))
    assert (memory(annotated).codes, memory(annotated).scales) == (memory(packed).codes, memory(packed).scales)


def test_a_short_last_block_has_a_scale_as_it_will_have_packed() -> None:
    ragged = passed(trace(tiny("llama-tiny", intermediate_size=84)), (*RAISE, *config_a())).twin(torch.bfloat16)
    packed = passed(ragged, (PackWeights(),))
    assert (memory(ragged).codes, memory(ragged).scales) == (memory(packed).codes, memory(packed).scales)
    assert bits_per_weight(ragged) == bits_per_weight(packed)


def test_activations_grow_with_rows_and_tokens() -> None:
    lowered = emitted(raised("llama-tiny"), "cpu")
    one, two = memory(lowered, batch=1, seq=16), memory(lowered, batch=2, seq=16)
    logits = 16 * 128 * 4
    assert one.activations >= logits and two.activations == 2 * one.activations
    assert memory(lowered, seq=1 << 20).seq == 256
