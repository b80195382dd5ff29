"""``quantize-kv-cache``: the prefill sees the keys and values that a cache in the annotated formats would hold."""

from __future__ import annotations

import pytest
import torch

from mxfx.formats import Format, parse
from mxfx.graph.execute import execute
from mxfx.graph.program import Program
from mxfx.graph.verify import verify
from mxfx.passes import Annotate, QuantizeKvCache, Rule
from mxfx.rewrite import FactError, Selector, apply
from mxfx.rewrite.facts import KV_QUANTIZED
from tests.filecheck import check_printed
from tests.programs import ATTENTION, padded_batch, raised, relative

M4, M8 = parse("mxint4@16"), parse("mxint8@16")


def annotated(family: str = "llama-tiny", **formats: Format) -> Program:
    return apply(Annotate(rule=(Rule(Selector(ATTENTION), **formats),)), raised(family)).program


def quantized(family: str = "llama-tiny", **formats: Format) -> Program:
    return apply(QuantizeKvCache(), annotated(family, **formats)).program


def test_keys_are_rounded_after_their_rotation_and_values_as_they_come() -> None:
    check_printed(
        quantized(kv=M4),
        """
        CHECK: %[[V:.+]] = aten.transpose.int(%view_2, 1, 2) : bf16[batch, 2, seq, 16]
        CHECK-NEXT: %[[V4:.+]] = mxfx.fake_quantize(%[[V]], "mxint4@16", -1) {{.*}} <quantize-kv-cache>
        CHECK: %[[K:.+]] = mxfx.rope({{.*}}) : bf16[batch, 2, seq, 16]
        CHECK-NEXT: %[[K4:.+]] = mxfx.fake_quantize(%[[K]], "mxint4@16", -1)
        CHECK: mxfx.attention(%rope_default, %[[K4]], %[[V4]],
        """,
    )


def test_four_bits_move_the_logits_of_the_prefill_more_than_eight() -> None:
    ids, mask, _ = padded_batch()
    free, four, eight = (
        execute(p, ids, None, mask)[mask.bool()] for p in (raised("llama-tiny"), quantized(kv=M4), quantized(kv=M8))
    )
    assert 0 < relative(eight, free) < relative(four, free)


def test_the_logits_are_those_of_rounding_by_hand() -> None:
    program = annotated(kv=M4)
    sources = {n.args[i] for n in program.nodes("attention") for i in (1, 2)}
    ids, mask, _ = padded_batch()

    def observe(node, value):
        return M4.fake_quantize(value) if node in sources else value

    expected = execute(program, ids, None, mask, observe=observe)
    assert torch.equal(execute(quantized(kv=M4), ids, None, mask), expected)


def test_keys_and_values_may_differ_and_one_may_stay() -> None:
    node = next(quantized(k=M4, v=M8).nodes("attention"))
    assert [node.args[i].args[1] for i in (1, 2)] == ["mxint4@16", "mxint8@16"]
    applied = apply(QuantizeKvCache(), annotated(v=M8))
    assert [s.reason for s in applied.record.skips] == ["k carries no format"] * 2
    assert next(applied.program.nodes("attention")).args[1].target is torch.ops.mxfx.rope.default


def test_queries_stay_as_they_are() -> None:
    node = next(quantized(kv=M4, q=M8).nodes("attention"))
    assert node.args[0].target is torch.ops.mxfx.rope.default


def test_a_key_norm_does_not_come_between() -> None:
    program = quantized("qwen3-tiny", kv=M4)
    verify(program)
    for node in program.nodes("attention"):
        assert node.args[1].args[0].target is torch.ops.mxfx.rope.default


def test_a_selection_quantizes_that_layer_alone() -> None:
    applied = apply(QuantizeKvCache(select=Selector(r"model\.layers\.1\..*")), annotated(kv=M4))
    assert [m.path for m in applied.record.matches] == ["model.layers.1.self_attn"] * 2


def test_a_second_run_adds_nothing() -> None:
    twice = apply(QuantizeKvCache(), quantized(kv=M4))
    assert twice.record.matches == [] and len(twice.record.skips) == 4
    assert len(list(twice.program.nodes("fake_quantize"))) == 4


def test_facts_are_required_and_verified() -> None:
    assert "k of model.layers.0.self_attn is to be mxint4@16 and is not quantized" in str(
        KV_QUANTIZED.check(annotated(kv=M4))
    )
    part = apply(QuantizeKvCache(select=Selector(r"model\.layers\.1\..*")), annotated(kv=M4)).program
    assert "k of model.layers.0.self_attn" in str(KV_QUANTIZED.check(part))
    with pytest.raises(FactError, match="requires 'annotated'"):
        apply(QuantizeKvCache(), raised("llama-tiny"))


@pytest.mark.parametrize(("option", "why"), [("keep_last", "rounded as they come"), ("keep_first", "0 or more")])
def test_what_no_cache_keeps_is_refused_by_name(option: str, why: str) -> None:
    with pytest.raises(ValueError, match=f"{option} = -1.*{why}"):
        QuantizeKvCache(**{option: -1})
