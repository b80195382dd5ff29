"""``pack-weights`` keeps rounded weights as bytes; nothing that the model computes changes."""

from __future__ import annotations

import pytest
import torch

from mxfx.config.emit import EmitConfig
from mxfx.export.artefact import WEIGHTS, load, save
from mxfx.formats import parse
from mxfx.graph.execute import execute
from mxfx.graph.node import kind
from mxfx.graph.program import Program
from mxfx.graph.verify import verify
from mxfx.passes import (
    Annotate,
    FuseNorm,
    InsertFakeQuant,
    Lower,
    PackWeights,
    RoundWeights,
    Rule,
    TransformInputs,
    UnpackWeights,
)
from mxfx.passes.unpack_weights import PACKED
from mxfx.pipeline.emit import emitted
from mxfx.rewrite import Selector, apply
from mxfx.rewrite.size import bits_per_weight
from mxfx.runtime.causal_lm import as_causal_lm
from tests.mixtures import raised_mixture
from tests.programs import MLP, QKVO, config_a, padded_batch, passed, raised

FORMATS = ("mxint2@32", "mxint3@32", "mxint4@16/mse", "mxint8@32", "mxfp4_e2m1@32", "mxfp6_e3m2@20", "mxfp8_e4m3@32")


def rounded(family: str, text: str = "mxint4@32/ceil", *, everything: bool = False) -> Program:
    """Decoder weights on a grid and their inputs in 4 bits; with `everything`, embedding and head too, in 8 bits."""
    if not everything:
        return passed(raised(family), config_a(parse(text), kv=None))
    wide = parse("mxint8@32")
    rules = [Rule(Selector(pattern), weight=parse(text), input=parse("mxint4@32")) for pattern in (QKVO, MLP)]
    rules += [Rule(Selector(r"model\.embed_tokens|lm_head"), weight=wide)]
    return passed(raised(family), (FuseNorm(), Annotate(rule=tuple(rules)), RoundWeights(), InsertFakeQuant()))


def logits(program: Program) -> torch.Tensor:
    ids, mask, _ = padded_batch()
    return execute(program, ids, None, mask)


@pytest.mark.parametrize("family", ["llama-tiny", "gemma3-tiny", "phi3-tiny"])
@pytest.mark.parametrize("everything", [False, True], ids=["decoder", "everything"])
def test_logits_keep_their_bits(family: str, everything: bool) -> None:
    before = rounded(family, everything=everything)
    applied = apply(PackWeights(), before)
    verify(applied.program)
    packed = {name.removesuffix(".codes") for name in applied.program.weights if name.endswith(".codes")}
    assert len(packed) == len(applied.record.matches) > 0 and not packed & set(applied.program.weights)
    assert torch.equal(logits(applied.program), logits(before))
    ids, mask, _ = padded_batch()
    assert torch.equal(execute(emitted(applied.program), ids, None, mask), execute(emitted(before), ids, None, mask))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("text", FORMATS)
def test_logits_keep_their_bits_in_every_format_and_dtype(text: str, dtype: torch.dtype) -> None:
    before = rounded("llama-tiny", text).twin(dtype)
    after = apply(PackWeights(), before).program
    assert sum(1 for n in after.graph.nodes if kind(n) == "mx_linear") == 14
    assert torch.equal(logits(after), logits(before))


def test_biases_stay_with_their_products() -> None:
    before = rounded("qwen2-tiny")
    after = apply(PackWeights(), before).program
    assert any(node.args[3] is not None for node in after.nodes("mx_linear"))
    assert torch.equal(logits(after), logits(before))


def test_a_tied_table_is_packed_once_for_lookup_and_head() -> None:
    rule = Rule(Selector(r"model\.embed_tokens|lm_head"), weight=parse("mxint8@32"))
    before = passed(raised("llama-tiny"), (Annotate(rule=(rule,)), RoundWeights()))
    after, record = (applied := apply(PackWeights(), before)).program, applied.record
    assert len(record.matches) == 1
    assert [kind(n) for n in after.nodes("mx_linear", "mx_embedding")] == ["mx_embedding", "mx_linear"]
    assert [name for name in after.weights if "codes" in name] == ["model.embed_tokens.weight.codes"]
    assert torch.equal(logits(after), logits(before))


def test_a_weight_off_its_grid_stays_and_says_so() -> None:
    before = rounded("llama-tiny").copy()
    name = "model.layers.0.mlp.up_proj.weight"
    before.weights.set(name, before.weights[name] * 1.01, "test")
    applied = apply(PackWeights(), before)
    assert name in applied.program.weights
    assert [s.path for s in applied.record.skips] == ["model.layers.0.mlp.up_proj"]
    assert "does not lie on the grid of mxint4@32/ceil" in applied.record.skips[0].reason
    assert torch.equal(logits(applied.program), logits(before))


def test_annotated_weights_that_nobody_rounded_are_left_alone() -> None:
    half = Rule(Selector(QKVO), weight=parse("mxint4@32"))
    more = Rule(Selector(MLP), weight=parse("mxint4@32"))
    before = passed(raised("llama-tiny"), (Annotate(rule=(half, more)), RoundWeights(select=Selector(QKVO))))
    record = apply(PackWeights(), before).record
    assert len(record.matches) == 8 and len(record.skips) == 6
    assert all("not rounded" in skip.reason for skip in record.skips)


def test_the_artefact_holds_no_float_copy(tmp_path) -> None:
    before = rounded("llama-tiny", everything=True)
    after = apply(PackWeights(), before).program
    save(after, tmp_path / "packed")
    save(before.twin(torch.float32), tmp_path / "float")
    packed, plain = ((tmp_path / name / WEIGHTS).stat().st_size for name in ("packed", "float"))
    assert packed < plain / 3
    ids = padded_batch()[0]
    with torch.no_grad():
        expected = as_causal_lm(before)(ids).logits
        assert torch.equal(as_causal_lm(load(tmp_path / "packed"))(ids).logits, expected)


def test_an_opened_artefact_stays_what_it_was_when_its_folder_is_written_again(tmp_path) -> None:
    packed = apply(PackWeights(), rounded("llama-tiny")).program
    save(packed, tmp_path)
    opened = load(tmp_path)
    expected = logits(opened)
    save(apply(PackWeights(), rounded("llama-tiny", "mxint2@32")).program, tmp_path)
    assert torch.equal(logits(opened), expected) and not torch.equal(logits(load(tmp_path)), expected)


def test_packing_changes_no_count_of_bits() -> None:
    before = rounded("llama-tiny", everything=True)
    after = apply(PackWeights(), before).program
    assert bits_per_weight(after) == pytest.approx(bits_per_weight(before), rel=1e-12)


def test_half_a_run_stops_where_bisect_says() -> None:
    applied = apply(PackWeights(), rounded("llama-tiny"), limit=1)
    assert sum(1 for n in applied.program.graph.nodes if kind(n) == "mx_linear") == 1


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "llama4_text", "deepseek_v3"])
def test_experts_are_packed_and_keep_their_bits(name: str) -> None:
    fmt = parse("mxint4@32")
    rule = Rule(Selector(type="linear, expert_linear"), weight=fmt)
    before = passed(raised_mixture(name), (Annotate(rule=(rule,)), RoundWeights()))
    applied = apply(PackWeights(), before)
    verify(applied.program)
    experts = list(applied.program.nodes("mx_expert_linear"))
    assert len(experts) == sum(1 for _ in before.nodes("expert_linear")) > 0
    ids = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(0))
    wanted = execute(before, ids)
    assert torch.equal(execute(applied.program, ids), wanted)
    back = apply(UnpackWeights(), applied.program).program
    assert not any(back.nodes(*PACKED)) and torch.equal(execute(back, ids), wanted)
    # Packed and lowered, as a GPU has it: the kernels' definitions here.
    lowered = apply(Lower(device="cuda"), applied.program).program
    assert torch.equal(execute(lowered, ids), execute(apply(Lower(), back).program, ids))


def test_packed_experts_take_four_bits_and_a_quarter() -> None:
    rule = Rule(Selector(type="expert_linear"), weight=parse("mxint4@32"))
    before = passed(raised_mixture("qwen3_moe"), (Annotate(rule=(rule,)), RoundWeights()))
    after = apply(PackWeights(), before).program
    stacks = {str(node.args[1].target): node for node in before.nodes("expert_linear")}
    held = sum(after.weights[f"{name}.{part}"].numel() for name in stacks for part in ("codes", "scales"))
    assert held * 8 == 4.25 * sum(before.weights[name].numel() for name in stacks)


def test_the_matrix_of_a_transform_is_saved_as_codes_and_runs_as_numbers(tmp_path, ctx) -> None:
    form = parse("mxint4@32")
    rule = Rule(Selector(MLP), weight=form, input=form)
    before = passed(raised("llama-tiny"), (FuseNorm(), Annotate(rule=(rule,))))
    before = apply(TransformInputs(kind="wush", block=32, matrix=parse("mxint6@32")), before, ctx).program
    before = passed(before, (RoundWeights(), InsertFakeQuant()))
    after = apply(PackWeights(), before).program
    verify(after)
    assert len(list(after.nodes("mx_decode"))) == 4
    assert not [name for name in after.weights if name.startswith("transforms.") and name.endswith(".input")]
    assert bits_per_weight(after) == pytest.approx(bits_per_weight(before))
    assert torch.equal(logits(after), logits(before))
    save(after, tmp_path / "saved")
    opened = load(tmp_path / "saved")
    for device in ("cpu", "cuda"):
        running = emitted(opened, settings=EmitConfig(device=device))
        assert not list(running.nodes("mx_decode"))
        assert torch.equal(logits(running), logits(emitted(before, settings=EmitConfig(device=device))))
