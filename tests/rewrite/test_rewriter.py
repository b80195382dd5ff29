"""What comes from the ``Rewriter`` for free: paths, fake values, accounting, the bisect counter, the ledger."""

from __future__ import annotations

import pytest
import torch

from mxfx.formats import parse
from mxfx.graph.node import Annotation, info, path_of
from mxfx.graph.verify import VerifyError, verify
from mxfx.passes import Lower
from mxfx.rewrite import Rewriter, apply
from mxfx.rewrite.inline import Inliner
from mxfx.rewrite.rewriter import clean
from tests.programs import raised

aten = torch.ops.aten


@pytest.fixture
def rw() -> Rewriter:
    return Rewriter(raised("llama-tiny").copy(), "test-pass")


def linear(rw: Rewriter, index: int = 0):
    return list(rw.program.nodes("linear"))[index]


def test_a_new_node_has_path_fake_value_and_origin(rw: Rewriter) -> None:
    at = linear(rw)
    new = rw.call(aten.relu.default, at.args[0], like=at)
    assert path_of(new) == path_of(at) == "model.layers.0.self_attn.q_proj"
    assert info(new).passes == ("test-pass",)
    assert new.meta["val"].shape == at.args[0].meta["val"].shape and new.meta["val"].dtype == torch.bfloat16
    assert new.next is at


def test_a_replaced_node_is_read_by_nobody_and_its_annotations_move_over(rw: Rewriter) -> None:
    at = linear(rw)
    rw.set_info(at, info(at).with_format("input", Annotation(parse("mxint4@32"), "me")))
    new = rw.call(aten.linear.default, *at.args, like=at)
    users = set(at.users)
    rw.replace(at, new)
    assert not at.users and set(new.users) == users
    assert str(info(new).formats["input"].format) == "mxint4@32"


def test_a_node_may_wrap_the_one_that_it_replaces(rw: Rewriter) -> None:
    at = linear(rw)
    users = set(at.users)
    new = rw.call(aten.relu.default, at, like=at, after=at)
    rw.replace(at, new)
    assert set(at.users) == {new} and set(new.users) == users
    verify(rw.program)


def test_readers_of_a_changed_node_count_as_touched(rw: Rewriter) -> None:
    at = linear(rw)
    (reader,) = at.users
    rw.replace(at, rw.call(aten.relu.default, at, like=at, after=at))
    assert reader.name in rw.record.touched
    assert info(reader).passes[-1] == "test-pass"


def test_a_node_with_readers_is_not_erased(rw: Rewriter) -> None:
    with pytest.raises(RuntimeError, match="users"):
        rw.erase(linear(rw))


def test_matches_are_numbered_from_one_with_node_and_path(rw: Rewriter) -> None:
    assert rw.match(linear(rw, 0)) and rw.match(linear(rw, 1), note="why", rule="rule 1")
    assert [(m.index, m.path) for m in rw.record.matches] == [
        (1, "model.layers.0.self_attn.q_proj"), (2, "model.layers.0.self_attn.k_proj"),
    ]  # fmt: skip
    assert rw.record.matches[1].note == "why" and rw.record.matches[1].rule == "rule 1"


def test_at_the_bisect_limit_no_match_may_be_done() -> None:
    rw = Rewriter(raised("llama-tiny").copy(), "test-pass", limit=1)
    assert rw.match(linear(rw, 0))
    assert not rw.record.limited
    assert not rw.match(linear(rw, 1))
    assert rw.record.limited and len(rw.record.matches) == 1


def test_a_skip_keeps_its_reason(rw: Rewriter) -> None:
    rw.skip(linear(rw), "too small", depth=3)
    (skip,) = rw.record.skips
    assert (skip.reason, skip.depth, skip.path) == ("too small", 3, "model.layers.0.self_attn.q_proj")


def test_a_weight_node_before_the_place_is_reused(rw: Rewriter) -> None:
    at = linear(rw)
    assert rw.weight(str(at.args[1].target), at) is at.args[1]


def test_a_changed_weight_touches_its_readers_under_every_name(rw: Rewriter) -> None:
    rw.set_weight("lm_head.weight", rw.weights["lm_head.weight"] * 2)
    (embedding,) = rw.program.nodes("embedding")
    assert {embedding.name, linear(rw, -1).name} <= rw.record.touched
    assert rw.weights.ledger[-1].pass_name == "test-pass"


def test_a_constant_runs_in_compute_precision_and_a_weight_in_the_model_s(rw: Rewriter) -> None:
    at = linear(rw)
    constant = rw.add_weight("rotation", torch.eye(4), at, constant=True)
    weight = rw.add_weight("extra", torch.eye(4), at)
    assert (constant.meta["val"].dtype, weight.meta["val"].dtype) == (torch.float32, torch.bfloat16)


def test_cleaning_removes_dead_nodes_and_unread_weights_but_no_input(rw: Rewriter) -> None:
    at = linear(rw)
    rw.add_weight("unread", torch.eye(4), at)
    rw.call(aten.relu.default, at, like=at, after=at)
    before = len(rw.graph.nodes)
    clean(rw.program)
    assert len(rw.graph.nodes) == before - 2
    assert "unread" not in rw.weights
    assert [n.target for n in rw.graph.nodes if n.op == "placeholder"] == [
        "input_ids",
        "position_ids",
        "attention_mask",
    ]
    verify(rw.program)


def test_the_program_that_was_copied_does_not_change(rw: Rewriter) -> None:
    before = str(raised("llama-tiny").graph)
    at = linear(rw)
    rw.replace(at, rw.call(aten.relu.default, at, like=at, after=at))
    rw.set_weight("model.norm.weight", torch.zeros(64))
    assert str(raised("llama-tiny").graph) == before
    assert raised("llama-tiny").weights["model.norm.weight"].abs().sum() > 0


def test_operands_of_an_mxfx_op_stand_in_order_however_they_are_given(rw: Rewriter) -> None:
    at = linear(rw)
    quantize = torch.ops.mxfx.fake_quantize.default
    assert rw.call(quantize, at.args[1], axis=0, format="mxint4@16", like=at).args[1:] == ("mxint4@16", 0)
    norm = rw.call(torch.ops.mxfx.rms_norm.default, at.args[0], None, eps=1e-6, gain_first=True, like=at)
    assert (norm.args[1:], dict(norm.kwargs)) == ((None, 1e-6, 0.0, True), {})
    assert rw.call(aten.sum.dim_IntList, at.args[0], [-1], keepdim=True, like=at).kwargs == {"keepdim": True}


def test_an_operand_by_name_that_no_rewriter_put_in_order_is_a_fault(rw: Rewriter) -> None:
    at = linear(rw)
    node = rw.call(torch.ops.mxfx.fake_quantize.default, at.args[1], "mxint4@16", like=at)
    rw.set_operand(at, 1, node)
    node.kwargs = {"axis": 0}
    with pytest.raises(VerifyError, match=r"'axis' is given by name.*in the order of mxfx::fake_quantize"):
        verify(rw.program)


def test_a_definition_is_traced_anew_where_operands_are_the_same_node(rw: Rewriter) -> None:
    """The trace of f(x, x) is not that of f(x, y)."""

    def difference(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x * 2 - y

    rw = Rewriter(apply(Lower(), raised("llama-tiny")).program.copy(), "test")
    at = linear(rw)
    one, other = at.args[0], rw.call(aten.relu.default, at.args[0], like=at)
    inliner = Inliner(rw)
    made = []
    for operands in ((one, one), (one, other)):
        node = rw.call(aten.sub.Tensor, *operands, like=at)
        made.append(inliner.inline(node, difference))
    assert [(node.args[0].args[0], node.args[1]) for node in made] == [(one, one), (one, other)]
