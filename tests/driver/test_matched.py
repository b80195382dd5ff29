"""What ``check`` says of rules and sites: by role, with reasons, and which axes a block does not divide."""

from __future__ import annotations

from pathlib import Path

from mxfx.config import loads
from mxfx.driver.check import check
from mxfx.driver.matched import attention_lines, matched_lines, site_lines
from mxfx.formats import parse
from mxfx.graph.tiny import tiny
from mxfx.graph.trace import trace
from mxfx.passes import (
    Annotate,
    FuseNorm,
    FuseNormQuant,
    Gptq,
    OnlineRotation,
    RaiseAttention,
    RotationSearch,
    RoundWeights,
    Rule,
    TransformInputs,
    TransformKv,
)
from mxfx.rewrite import PassRecord, Selector, apply
from mxfx.rewrite.record import Skip
from tests.architectures import build
from tests.local_model import save_model
from tests.mixtures import raised_mixture
from tests.programs import RAISE, passed, raised


def test_rules_are_told_by_role_with_what_they_leave_out() -> None:
    rules = (
        Rule(role="mlp", weight=parse("mxint4@32"), input=parse("mxint4@32")),
        Rule(role="attention", kv=parse("mxint8@32")),
    )
    applied = apply(Annotate(rules, partial=True), raised("phi3-tiny"))
    first, second, share = matched_lines(applied.program, [applied.record])
    assert first == "rule 1: 2 gate_up_proj, 2 down_proj; 4 weight=mxint4@32, input=mxint4@32"
    assert second == "rule 2: 2 attention; 2 k=mxint8@32, v=mxint8@32"
    assert "float stay 2 qkv_proj, 2 o_proj, 1 head" in share


def test_experts_and_routers() -> None:
    applied = apply(Annotate((Rule(role="mlp, attention", weight=parse("mxint4@32")),)), raised_mixture("mixtral"))
    _, share = matched_lines(applied.program, [applied.record])
    assert "100.0% are to be in a format" in share and "2 router, 1 head" in share


def test_an_axis_that_its_block_does_not_divide() -> None:
    applied = apply(Annotate((Rule(role="mlp", weight=parse("mxint4@64")),), partial=True), raised("phi3-tiny"))
    assert list(matched_lines(applied.program, [applied.record]))[-1] == (
        "a ragged last block: 2 down_proj of 96 in blocks of 64 (blocks of 48 divide it)"
    )


def test_passes_say_where_they_work_and_why_not() -> None:
    rule = Rule(role="mlp", weight=parse("mxint4@32"), input=parse("mxint4@32"))
    fused = apply(FuseNorm(), raised("qwen3-tiny"))
    annotated = apply(Annotate((rule,), partial=True), fused.program)
    passes = (FuseNorm(), Annotate((rule,)), TransformInputs(block=20), Gptq())
    norms, transforms, gptq = site_lines(annotated.program, passes, [fused.record, annotated.record])
    assert norms.startswith("fuse-norm: 5 sites; 4 rms_norm not: ") and "reads it, which is no linear" in norms
    assert transforms == (
        "transform-inputs: no sites; 2 gate_proj not: no Hadamard matrix of order 20 fits its 64 input channels; "
        "2 down_proj not: no Hadamard matrix of order 20 fits its 96 input channels"
    )
    assert gptq == "gptq: 6 sites"


def test_a_select_that_fits_no_module_is_a_warning_and_one_of_nodes_that_a_pass_will_make_is_none() -> None:
    program = raised("llama-tiny")
    passes = (RoundWeights(select=Selector(".*up_porj")), RoundWeights(select=Selector(type="made_later")))
    (said,) = site_lines(program, passes, [])
    assert said.startswith("warning: round-weights: select = '.*up_porj' fits no node; ") and ".up_proj'" in said


def test_the_block_that_each_axis_gets_is_told_before_a_run() -> None:
    model = tiny("llama-tiny", layers=1, hidden_size=80, intermediate_size=176, head_dim=48)
    m4 = parse("mxint4@32")
    rules = Annotate((Rule(role="attention, mlp", weight=m4, input=m4), Rule(role="attention", kv=m4)))
    program = apply(rules, passed(trace(model), RAISE)).program
    passes = (TransformInputs(block=32), TransformKv(block=32), RotationSearch(sites=("down_proj",)), OnlineRotation())
    inputs, kv, search, online = site_lines(program, passes, [])
    assert inputs == (
        "transform-inputs: 4 sites (2 hadamard 16 (32 does not divide 80), 1 hadamard 32, "
        "1 hadamard 16 (32 does not divide 176))"
    )
    assert kv == (
        "transform-kv: 1 sites (1 keys, hadamard 16 (32 does not divide 48) and values, hadamard 16 "
        "(32 does not divide 48))"
    )
    assert search == "rotation-search: 1 sites (1 input, order 176)"
    assert online.startswith("online-rotation: 7 sites (5 input, order 80, 1 input, order 192, 1 input, order 176)")


def test_an_attention_that_is_not_raised_is_warned_of() -> None:
    reason = "its softmax has another operand"
    skips = [Skip(f"bmm_{i}", f"transformer.h.{i}.self_attention", reason) for i in range(2)]
    (line,) = attention_lines([PassRecord("raise-attention", skips=skips)])
    assert line == (f"warning: 2 attentions (such as transformer.h.0.self_attention) are not raised: {reason}")
    spelled_out = passed(trace(build("bloom"), proven=False), RAISE[:2])
    assert list(attention_lines([apply(RaiseAttention(), spelled_out).record])) == []


def test_what_the_emit_stage_fuses_is_not_asked_before_it_is_there() -> None:
    assert list(site_lines(raised("llama-tiny"), (FuseNormQuant(), FuseNorm()), [])) == ["fuse-norm: 5 sites"]


def test_check_tells_of_formats_that_no_pass_rounds_to_and_counts_no_bits_of_them(tmp_path: Path) -> None:
    model = f"[model]\nname = '{save_model(tmp_path / 'm')}'\ndtype = 'float32'\n"
    text = model + "[[pass]]\nname = 'annotate'\npartial = true\nrule = [{ role = 'mlp', weight = 'mxint4@32' }]\n"
    found = {}
    for behind in ("", "round-weights", 'gptq"\nselect = ".*down_proj'):
        whole = text + (f'[[pass]]\nname = "{behind}"\n' if behind else "")
        lines = list(check(loads(whole)).lines())
        found[behind] = ([line for line in lines if line.startswith("warning")], lines[-1])
    (none, wide), (whole, narrow), (part, _) = found.values()
    assert len(none) == 1 and none[0].endswith("no pass behind it does that; add distill or gptq or round-weights")
    assert wide == "bits per weight after rounding: 32.00" and narrow != wide and whole == []
    assert len(part) == 1 and "gate_proj" in part[0] and "gptq behind it leaves that out" in part[0]
