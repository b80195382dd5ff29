"""Patterns match dataflow: operands, commuted operands, repeated bindings; a failure says how far it came."""

from __future__ import annotations

import torch
from torch import fx

from mxfx.rewrite.pattern import Failed, Found, Op, Var, is_node, is_number, is_weight, match

aten = torch.ops.aten


def graph() -> tuple[fx.Graph, fx.Node, fx.Node]:
    made = fx.Graph()
    return made, made.placeholder("x"), made.create_node("get_attr", "gain")


def test_a_tree_of_ops_binds_its_variables() -> None:
    made, x, gain = graph()
    squared = made.call_function(aten.pow.Tensor_Scalar, (x, 2))
    root = made.call_function(aten.mul.Tensor, (gain, squared))
    found = match(Op(aten.mul.Tensor, (Var("g", is_weight), Op(aten.pow.Tensor_Scalar, (Var("x"), 2)))), root)
    assert isinstance(found, Found)
    assert found.bound == {"g": gain, "x": x}
    assert found.nodes == {root, squared}


def test_operands_match_in_either_order_only_where_the_pattern_says_so() -> None:
    made, x, gain = graph()
    root = made.call_function(aten.mul.Tensor, (x, gain))
    pattern = (Var("g", is_weight), Var("x", lambda operand: operand is x))
    assert isinstance(match(Op(aten.mul.Tensor, pattern), root), Failed)
    swapped = match(Op(aten.mul.Tensor, pattern, swap=True), root)
    assert isinstance(swapped, Found) and swapped.bound == {"g": gain, "x": x}


def test_a_choice_that_fits_locally_is_given_up_if_the_rest_does_not_fit() -> None:
    """The first order of the inner sum binds ``a`` to x, which the outer product then refuses."""
    made, x, gain = graph()
    inner = made.call_function(aten.add.Tensor, (x, gain))
    root = made.call_function(aten.mul.Tensor, (inner, gain))
    pattern = Op(aten.mul.Tensor, (Op(aten.add.Tensor, (Var("a"), Var("b")), swap=True), Var("a")))
    found = match(pattern, root)
    assert isinstance(found, Found) and found.bound == {"a": gain, "b": x}


def test_a_variable_is_the_same_operand_everywhere() -> None:
    made, x, gain = graph()
    square = Op(aten.mul.Tensor, (Var("x"), Var("x")))
    assert isinstance(match(square, made.call_function(aten.mul.Tensor, (x, x))), Found)
    failed = match(square, made.call_function(aten.mul.Tensor, (x, gain)))
    assert isinstance(failed, Failed) and "x is x here and gain there" in failed.reason


def test_lists_and_constants_are_compared() -> None:
    made, x, _ = graph()
    root = made.call_function(aten.mean.dim, (x, [-1], True))
    assert isinstance(match(Op(aten.mean.dim, (Var("x"), [-1], True)), root), Found)
    failed = match(Op(aten.mean.dim, (Var("x"), [-2], True)), root)
    assert isinstance(failed, Failed) and failed.reason == "expected -2, found -1"


def test_nodes_inside_lists_match() -> None:
    made, x, gain = graph()
    root = made.call_function(aten.cat.default, ([x, gain], -1))
    found = match(Op(aten.cat.default, ([Var("a"), Var("b", is_weight)], -1)), root)
    assert isinstance(found, Found) and found.bound == {"a": x, "b": gain}


def test_a_pattern_of_leading_operands_ignores_the_rest_but_not_missing_ones() -> None:
    made, x, _ = graph()
    root = made.call_function(aten.mean.dim, (x, [-1], True))
    assert isinstance(match(Op(aten.mean.dim, (Var("x"),)), root), Found)
    failed = match(Op(aten.mean.dim, (Var("x"), [-1], True, None)), root)
    assert isinstance(failed, Failed) and "has 3 operands, expected 4" in failed.reason


def test_the_deepest_failure_is_the_one_reported() -> None:
    made, x, gain = graph()
    deep = made.call_function(aten.pow.Tensor_Scalar, (x, 3))
    root = made.call_function(aten.mul.Tensor, (deep, gain))
    pattern = Op(aten.mul.Tensor, (Op(aten.pow.Tensor_Scalar, (Var("x"), 2)), Var("g")), swap=True)
    failed = match(pattern, root)
    assert isinstance(failed, Failed) and failed.reason == "expected 2, found 3"
    shallow = match(pattern, deep)
    assert isinstance(shallow, Failed) and shallow.depth < failed.depth
    assert "expected aten.mul.Tensor, found aten.pow.Tensor_Scalar at pow" in shallow.reason


def test_what_may_be_bound_is_told_apart() -> None:
    _, x, gain = graph()
    assert (is_node(x), is_weight(x), is_number(x)) == (True, False, False)
    assert (is_node(gain), is_weight(gain), is_number(1e-6)) == (True, True, True)
