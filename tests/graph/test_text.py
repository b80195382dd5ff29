"""The printed IR reads back as the same program, and refuses what it was not printed as."""

from __future__ import annotations

import pytest
import torch

from mxfx.graph.execute import execute
from mxfx.graph.node import info
from mxfx.graph.text import HashMismatch, Printer, TextError, parse, to_text
from mxfx.rewrite.rewriter import Rewriter

FAMILIES = ("llama-tiny", "qwen2-tiny", "qwen3-tiny", "mistral-tiny", "gemma-tiny")
STAGES = ("traced", "quantized", "lowered")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("family", FAMILIES)
def test_parsing_and_printing_gives_the_same_bytes(program, family, stage):
    text = to_text(program(family, stage))
    assert to_text(parse(text)) == text


@pytest.mark.parametrize("stage", STAGES)
def test_a_parsed_program_computes_the_same_bits(program, stage):
    original = program("llama-tiny", stage)
    ids = torch.arange(20).reshape(2, 10) % 128
    again = parse(to_text(original), original.weights)
    assert torch.equal(execute(again, ids), execute(original, ids))


def test_a_program_without_weights_keeps_shapes_types_and_hashes(program):
    original = program("qwen2-tiny", "quantized")
    again = parse(to_text(original))
    assert all(tensor.device.type == "meta" for tensor in again.weights.values())
    assert {n: again.weights.hash(n) for n in again.weights} == {n: original.weights.hash(n) for n in original.weights}
    assert again.weights.aliases == original.weights.aliases
    assert again.weights.constants & set(again.weights) == original.weights.constants & set(original.weights)


def test_symbols_come_back_with_their_ranges(program):
    original = program("llama-tiny", "raised")
    assert _ranges(parse(to_text(original))) == _ranges(original)
    assert parse(to_text(original)).symbols == original.symbols


def _ranges(program):
    val = next(n for n in program.graph.nodes if n.op == "placeholder").meta["val"]
    return [str(val.fake_mode.shape_env.var_to_range[size.node.expr]) for size in val.shape]


def test_annotations_notes_and_passes_come_back(program):
    original = program("llama-tiny", "quantized")
    again = {n.name: info(n) for n in parse(to_text(original)).graph.nodes}
    linear = next(n for n in original.graph.nodes if "weight" in info(n).formats)
    assert dict(again[linear.name].formats) == dict(info(linear).formats)
    assert dict(again[linear.name].notes) == dict(info(linear).notes)
    assert again[linear.name].passes == info(linear).passes
    assert again[linear.name].path == info(linear).path


def test_types_formats_and_module_paths_are_on_the_page(program):
    text = to_text(program("llama-tiny", "quantized"))
    assert " model.layers.0.mlp.up_proj:\n" in text
    assert ": bf16[batch, seq, 64] in mxint4@32" in text
    assert '{weight: mxint4@32 by "annotate rule 1", input: mxint4@32}' in text
    assert "symbols batch in [1, 4096], seq in [1, 256]" in text


def test_another_weight_under_the_same_name_is_refused(program):
    original = program("llama-tiny", "raised")
    store = dict(original.weights.items())
    store["model.norm.weight"] = store["model.norm.weight"] + 1
    with pytest.raises(
        HashMismatch, match=r"line \d+: weight 'model.norm.weight' is #\w+ in the text and #\w+ in the store"
    ):
        parse(to_text(original), store)


def test_a_missing_weight_is_named(program):
    original = program("llama-tiny", "raised")
    store = {n: t for n, t in original.weights.items() if n != "model.norm.weight"}
    with pytest.raises(TextError, match=r"no weight 'model.norm.weight'"):
        parse(to_text(original), store)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("mxfx-ir 1", "mxfx-ir 9", "is this a printed program"),
        ("graph\n", "graf\n", "expected a weight"),
        ("\ndtype f32", "\ndtyp f32", "unexpected header line 'dtyp'"),
        ("%linear = aten.linear(", "%linear = aten.lenear(", "unknown op 'aten.lenear'"),
        ("%linear = aten.linear(%fake", "%linear = aten.linear(%fale", "read before it is defined"),
        ("@model.norm.weight,", "@model.nrm.weight,", "not among the weights"),
        ("%linear = ", "%view = ", "defined twice"),
        (": bf16[batch, seq, 128]", ": bf16[batch, seq, 127]", "is said to be"),
        ("  return %linear_14", "", "without 'return'"),
        ("(%embedding, @model.layers.0", "(%embedding; @model.layers.0", "unexpected ';"),
        ("by \"annotate rule 1\"", "by annotate", "expected JSON"),
        ("{weight: mxint4@32", "{weight: mxint9000@32", "mxint9000"),
        ("seq in [1, 256]", "sek in [1, 256]", "the size 'seq' is not among"),
    ],
)  # fmt: skip
def test_a_damaged_text_is_refused_with_its_line(program, old, new, message):
    text = to_text(program("llama-tiny", "quantized"))
    assert old in text
    with pytest.raises(TextError, match=r"^line \d+, column \d+: ") as caught:
        parse(text.replace(old, new, 1))
    assert message in str(caught.value)


def test_a_printer_says_of_each_program_what_a_new_one_says(program):
    """What stayed as it was is not put into words again; what reads another weight, value or record is."""
    source = program("llama-tiny", "raised")
    printer = Printer()
    assert str(printer.print(source)) == to_text(source)
    rw = Rewriter(source.copy(), "test")
    first, second, *_ = rw.program.nodes("linear")
    # One of each thing that a line holds: a weight under the name that another had, a literal, a note, a type.
    first.args[1].target = "model.layers.1.self_attn.q_proj.weight"
    next(rw.program.nodes("rms_norm")).update_arg(2, 0.125)
    rw.set_info(second, info(second).with_note("seen", 1))
    last = list(rw.program.nodes("linear"))[-1]
    last.meta["val"] = last.meta["val"].float()
    changed = to_text(rw.program)
    assert str(printer.print(rw.program)) == changed != to_text(source)
    for words in ("@model.layers.1.self_attn.q_proj.weight) : bf16", "0.125", '"seen": 1', ") : f32[batch, seq, 128]"):
        assert words in changed, words
    assert str(printer.print(source)) == to_text(source)


def test_lines_that_stayed_the_same_are_not_made_again(program):
    source = program("llama-tiny", "raised")
    printer = Printer()
    before = {id(line) for line in printer.lines(source)}
    assert {id(line) for line in printer.lines(source.copy())} == before
