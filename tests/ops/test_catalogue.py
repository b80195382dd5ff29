"""The catalogue: what an op says of itself, and what passes may ask of a node."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from mxfx.graph.node import kind
from mxfx.ops.catalogue import (
    Contraction,
    Record,
    activation,
    describe,
    in_schema_order,
    multiplies,
    record_of,
    spec,
    weight,
    weights_of,
)

aten, dialect = torch.ops.aten, torch.ops.mxfx


@pytest.fixture
def graph() -> fx.Graph:
    return fx.Graph()


def test_operands_are_found_by_name_wherever_they_stand(graph: fx.Graph) -> None:
    x, w, b = graph.placeholder("x"), graph.get_attr("w"), graph.get_attr("b")
    by_place = graph.call_function(aten.linear.default, (x, w, b))
    by_name = graph.call_function(aten.linear.default, (x, w), {"bias": b})
    bare = graph.call_function(aten.linear.default, (x, w))
    assert [spec(n).get("bias") for n in (by_place, by_name, bare)] == [b, b, None]
    assert spec(bare).get("input") is x and spec(bare).get("output") is None
    assert weights_of(by_name) == {"weight": w, "bias": b}
    with pytest.raises(KeyError, match="has no operand 'gain'; it has weight, input, output, bias"):
        spec(bare).get("gain")


def test_a_weight_that_a_call_lacks_carries_no_format(graph: fx.Graph) -> None:
    x, w = graph.placeholder("x"), graph.get_attr("w")
    assert spec(graph.call_function(aten.linear.default, (x, w))).carries == ("weight", "input", "output")
    assert spec(graph.call_function(dialect.rms_norm.default, (x, None, 1e-5))).carries == ("input", "output")


def test_arguments_of_the_schema_are_read_by_name_with_their_defaults(graph: fx.Graph) -> None:
    norm = spec(graph.call_function(dialect.rms_norm.default, (graph.placeholder("x"), None, 1e-5)))
    assert (norm.get("eps"), norm.get("offset"), norm.get("gain_first")) == (1e-5, 0.0, False)


def test_what_an_op_contracts_says_whether_it_is_a_product_with_a_weight(graph: fx.Graph) -> None:
    x, w = graph.placeholder("x"), graph.get_attr("w")
    linear = spec(graph.call_function(aten.linear.default, (x, w)))
    attention = spec(graph.call_function(dialect.attention.default, (x, x, x, None, 0.1)))
    assert linear.product == Contraction("input", "weight", (-1, -1), "input channels")
    assert attention.product is None and [(c.left, c.right, c.over) for c in attention.contracts] == [
        ("q", "k", "head_dim"),
        ("probs", "v", "seq"),
    ]
    assert multiplies(linear.node, x) and not multiplies(linear.node, w) and not multiplies(attention.node, x)
    both = graph.call_function(aten.linear.default, (x, x))
    assert not multiplies(both, x)


def test_rounding_is_read_off_any_op_that_rounds(graph: fx.Graph) -> None:
    x = graph.placeholder("x")
    alone = graph.call_function(dialect.fake_quantize.default, (x, "mxint4@32", 2))
    alone.meta["val"] = torch.empty(2, 3, 64)
    fused = graph.call_function(dialect.norm_quantize.default, (x, None, None, "mxfp4@32", 1e-5))
    assert [(spec(n).rounds.format, spec(n).rounds.axis) for n in (alone, fused)] == [
        ("mxint4@32", -1),
        ("mxfp4@32", -1),
    ]
    assert spec(x).rounds is None


def test_one_record_makes_an_op_known(graph: fx.Graph) -> None:
    target = aten.addmm.default
    before = record_of(target)
    describe(
        target,
        "addmm",
        operands=(weight("bias", "self"), activation("input", "mat1"), weight("weight", "mat2", axis=-2)),
        contracts=(Contraction("input", "weight", axes=(-1, -2)),),
    )
    try:
        b, x, w = graph.get_attr("b"), graph.placeholder("x"), graph.get_attr("w")
        node = graph.call_function(target, (b, x, w))
        assert kind(node) == "addmm" and weights_of(node) == {"bias": b, "weight": w}
        assert spec(node).product.axes == (-1, -2) and spec(node).axis("weight") == -2 and multiplies(node, x)
    finally:
        from mxfx.ops import catalogue

        catalogue._RECORDS.pop(target) if before is None else catalogue.add(before)


def test_a_record_that_does_not_fit_its_op_is_refused() -> None:
    with pytest.raises(ValueError, match="has no argument 'gate' for the operand 'gate'; it takes input, weight, bias"):
        Record("linear", aten.linear.default, "linear", operands=(activation("gate"),))
    with pytest.raises(ValueError, match="contracts 'weight', which is no operand: input"):
        Record("linear", aten.linear.default, "linear", (activation("input"),), (Contraction("input", "weight"),))


def test_operands_by_name_come_into_the_order_of_the_schema() -> None:
    norm = dialect.rms_norm.default
    assert in_schema_order(norm, (1, 2), {"gain_first": True, "eps": 0.5}) == (1, 2, 0.5, 0.0, True)
    assert in_schema_order(norm, (1,), {"gain_first": True}) is None, "eps has no default"
    assert in_schema_order(norm, (1, 2, 3), {"eps": 0.5}) is None, "given twice"
