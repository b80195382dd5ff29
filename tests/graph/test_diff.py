"""Diffs show what a pass edited, and nothing else."""

from __future__ import annotations

from mxfx.graph.diff import diff
from mxfx.passes import RaiseNorm
from mxfx.rewrite import apply


def test_equal_programs_have_no_diff(program):
    assert diff(program("llama-tiny", "raised"), program("llama-tiny", "raised").copy()) == ""


def test_an_edit_that_repeats_is_shown_once(program):
    before = program("llama-tiny", "traced")
    text = diff(before, apply(RaiseNorm(), before).program)
    assert text.count("+ %rms_norm_default") == 1
    assert "and 4 more like this: model.layers.0.post_attention_layernorm" in text
    assert len(text.splitlines()) < 30


def test_every_place_is_shown_on_request(program):
    before = program("llama-tiny", "traced")
    text = diff(before, apply(RaiseNorm(), before).program, collapse=False)
    assert text.count("+ %rms_norm_default") == 5


def test_changed_facts_and_weights_are_part_of_a_diff(program):
    text = diff(program("llama-tiny", "raised"), program("llama-tiny", "quantized"))
    assert "+ facts " in text and "weights-rounded" in text
    assert "@@ weights: 14 before, 14 after @@" in text
