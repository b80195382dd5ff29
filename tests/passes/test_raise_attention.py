"""``raise-attention``: attention from the interface is counted, a model's own SDPA is rewritten, bits stay."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx

from mxfx.graph.execute import execute
from mxfx.graph.node import operands
from mxfx.graph.program import Program
from mxfx.graph.tiny import FAMILIES
from mxfx.graph.trace import trace
from mxfx.passes import RaiseAttention, RaiseNorm, RaiseRope
from mxfx.rewrite import Context, FactError, Rewriter, apply
from mxfx.rewrite.rewriter import clean
from tests.architectures import VOCABULARY, build
from tests.filecheck import check_printed
from tests.graph.test_functional import Toy, toy
from tests.programs import padded_batch, passed, raised, traced

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default


def before() -> Program:
    return passed(traced("llama-tiny"), (RaiseNorm(), RaiseRope()))


def with_own_attention(*, additive: bool = False, dropout: float = 0.0, scale: float | None = 0.25) -> Program:
    """As a model spells it that knows no interface: heads repeated by hand, then SDPA."""
    program = before().copy()
    program.facts -= {"raised", "attention-raised"}
    rw = Rewriter(program, "test")
    for node in program.nodes("attention"):
        q, k, v = node.args[:3]
        repeated = [_repeat(rw, source, node) for source in (k, v)]
        mask = _number_of_each_key(rw, k, node) if additive else None
        own = rw.call(SDPA, q, *repeated, mask, dropout, not additive, scale=scale, like=node, val=node.meta["val"])
        rw.replace(node, own)
    clean(program)
    return program


def _number_of_each_key(rw: Rewriter, k: fx.Node, like: fx.Node) -> fx.Node:
    return rw.call(aten.transpose.int, rw.call(aten.mean.dim, k, [1, 3], True, like=like), 2, 3, like=like)


def _repeat(rw: Rewriter, source: fx.Node, like: fx.Node) -> fx.Node:
    _, heads, _, dim = source.meta["val"].shape
    sizes = [n for n in rw.graph.nodes if n.target is aten.sym_size.int][:2]
    wide = rw.call(aten.unsqueeze.default, source, 2, like=like)
    shape = [sizes[0], heads, 2, sizes[1], dim]
    spread = rw.call(aten.expand.default, wide, shape, like=like)
    return rw.call(aten.reshape.default, spread, [sizes[0], heads * 2, sizes[1], dim], like=like)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_traced_through_the_interface_is_counted(family: str) -> None:
    record = apply(RaiseAttention(), passed(traced(family), (RaiseNorm(), RaiseRope()))).record
    assert [m.path for m in record.matches] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert {m.note for m in record.matches} == {"traced through the attention interface"}


def test_a_model_s_own_sdpa_is_raised_with_its_heads_unrepeated_and_no_bit_changes() -> None:
    program = with_own_attention()
    applied = apply(RaiseAttention(), program)
    ids, _, _ = padded_batch()
    assert torch.equal(execute(applied.program, ids), execute(program, ids))
    check_printed(
        applied.program,
        """
        CHECK: %[[Q:.+]] = mxfx.rope({{.*}}bf16[batch, 4, seq, 16]
        CHECK: %[[K:.+]] = mxfx.rope({{.*}}bf16[batch, 2, seq, 16]
        CHECK: mxfx.attention(%[[Q]], %[[K]], %transpose_2, None, 0.25)
        CHECK-NOT: scaled_dot_product_attention
        CHECK-NOT: aten.expand
        CHECK: return
        """,
    )


def test_the_scale_that_sdpa_takes_by_default_is_written_out() -> None:
    program = apply(RaiseAttention(), with_own_attention(scale=None)).program
    assert {n.args[4] for n in program.nodes("attention")} == {16**-0.5}


def test_attention_with_dropout_is_skipped_with_the_reason() -> None:
    program = with_own_attention(dropout=0.1)
    rw = Rewriter(program.copy(), "raise-attention")
    RaiseAttention().run(rw, Context())
    assert rw.record.matches == [] and len(rw.record.skips) == 2
    assert all("dropout 0.1" in skip.reason for skip in rw.record.skips)


def test_a_mask_that_is_added_becomes_a_bias_and_no_bit_changes() -> None:
    program = with_own_attention(additive=True)
    applied = apply(RaiseAttention(), program)
    assert all(operands(node)["bias"] is not None for node in applied.program.nodes("attention"))
    ids, _, _ = padded_batch()
    assert torch.equal(execute(applied.program, ids), execute(program, ids))


#: An architecture that spells its attention out → what its attention reads beside queries, keys and values.
SPELLED_OUT = {
    "bloom": {"mask": "attention_mask", "causal": True, "bias": "(batch, 4, 1, seq)"},
    "codegen": {"mask": "attention_mask", "causal": True, "bias": ""},
    "falcon": {"mask": "attention_mask", "causal": True, "bias": ""},
    "gpt_neox_japanese": {"mask": "attention_mask", "causal": True, "bias": ""},
    "gptj": {"mask": "attention_mask", "causal": True, "bias": ""},
    "trocr": {"mask": "attention_mask", "causal": True, "bias": ""},
    "xglm": {"mask": "attention_mask", "causal": True, "bias": ""},
}


@pytest.mark.parametrize("name", SPELLED_OUT)
def test_products_around_a_softmax_are_the_same_function_as_one_node(name: str) -> None:
    """In float64 against the trace, in float32 against transformers; padding on the left."""
    model = build(name)
    traced = trace(model, proven=False)
    program = passed(traced, (RaiseNorm(), RaiseRope(), RaiseAttention()))
    found = [operands(node) for node in program.nodes("attention")]
    assert len(found) == 2 and not any(n.target is aten.softmax.int for n in program.graph.nodes)
    for given in found:
        said = {"mask": given["mask"].name, "causal": given["causal"], "bias": described(given["bias"], program)}
        assert said == SPELLED_OUT[name]
    ids = torch.randint(3, VOCABULARY, (2, 19), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    takes = "position_ids" in inspect.signature(model.forward).parameters
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, use_cache=False, **({"position_ids": positions} if takes else {}))
    torch.testing.assert_close(execute(program, ids, None, mask)[mask.bool()], expected.logits[mask.bool()])
    wide = [one.copy() for one in (traced, program)]
    for one in wide:
        one.dtype = torch.float64
    before, after = (execute(one, ids, None, mask)[mask.bool()] for one in wide)
    assert float((after - before).norm() / before.norm()) < 1e-14


def around_a_softmax(x: Tensor, changed: Callable[[Tensor], Tensor], *, merged: bool = False) -> Tensor:
    """Attention of two heads over hidden states, whose scores go through ``changed``."""
    batch, seq, width = x.shape
    heads = x.reshape(batch, seq, 2, width // 2).transpose(1, 2)
    heads = heads.reshape(batch * 2, seq, width // 2) if merged else heads
    found = torch.softmax(changed(heads @ heads.transpose(-1, -2)), -1) @ heads
    return found.reshape(batch, 2, seq, width // 2).transpose(1, 2).reshape(batch, seq, width)


def distances(model: Toy, x: Tensor) -> Tensor:
    places = torch.arange(x.shape[1], device=x.device)
    far = (places[:, None] - places).abs().to(x.dtype)
    return around_a_softmax(x, lambda scores: scores + far, merged=True)


def less(model: Toy, x: Tensor) -> Tensor:
    return around_a_softmax(x, lambda scores: scores - x.mean(-1)[:, None, None])


def one_where_true(model: Toy, x: Tensor) -> Tensor:
    return around_a_softmax(x, lambda scores: scores + (x.mean(-1) > 0)[:, None, None])


def heads_in_turn(model: Toy, x: Tensor) -> Tensor:
    """Four query heads that read two key heads as 0, 1, 0, 1."""
    batch, seq, width = x.shape
    q = x.reshape(batch, seq, 4, width // 4).transpose(1, 2)
    k = q[:, :2].unsqueeze(1).expand(batch, 2, 2, seq, width // 4).reshape(batch, 4, seq, width // 4)
    return (torch.softmax(q @ k.mT, -1) @ k).transpose(1, 2).reshape(batch, seq, width)


@pytest.mark.parametrize(
    ("between", "is_raised"), [(distances, True), (heads_in_turn, True), (less, False), (one_where_true, False)]
)
def test_attention_of_a_few_lines_is_raised_as_it_is_or_left_with_a_reason(between, is_raised: bool) -> None:
    program = passed(trace(toy(between), proven=False), (RaiseNorm(), RaiseRope()))
    applied = apply(RaiseAttention(), program)
    assert bool(list(applied.program.nodes("attention"))) == is_raised
    assert any("does not express" in skip.reason for skip in applied.record.skips) != is_raised
    ids = torch.randint(0, 40, (3, 7), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(execute(applied.program, ids), execute(program, ids), atol=1e-5, rtol=1e-5)


def described(bias: fx.Node | None, program: Program) -> str:
    if bias is None:
        return ""
    batch, seq = (
        str(size) for size in program.graph.find_nodes(op="placeholder", target="input_ids")[0].meta["val"].shape
    )
    return str(tuple(bias.meta["val"].shape)).replace(batch, "batch").replace(seq, "seq")


def test_the_other_raise_passes_come_first() -> None:
    with pytest.raises(FactError, match="requires 'norms-raised'"):
        apply(RaiseAttention(), traced("llama-tiny"))


def test_afterwards_the_program_counts_as_raised() -> None:
    assert {"norms-raised", "ropes-raised", "attention-raised", "raised"} <= raised("llama-tiny").facts
