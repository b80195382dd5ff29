"""Conditions on sizes that the exporter cannot prove: held by every size, or the model is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mxfx.graph.conditions import _batches, _lengths, _near
from mxfx.graph.errors import TraceError
from mxfx.graph.execute import execute
from mxfx.graph.text import parse, to_text
from mxfx.graph.trace import trace
from mxfx.graph.verify import verify
from tests.graph.test_functional import Toy, toy

LONGEST = 64


def chosen(model: Toy, x: Tensor) -> Tensor:
    """As sparse attention chooses keys: at most eight, at most as many as there are."""
    return x + x.mT.topk(min(8, x.shape[1]), dim=-1).values.sum(-1)[:, None]


def all_but_the_longest(model: Toy, x: Tensor) -> Tensor:
    return x * 2 if x.shape[1] != LONGEST else x


def long_ones_otherwise(model: Toy, x: Tensor) -> Tensor:
    return x * 2 if x.shape[1] > 40 else x


def large_batches_otherwise(model: Toy, x: Tensor) -> Tensor:
    return x * 2 if x.shape[0] > 50 else x


def one_batch_otherwise(model: Toy, x: Tensor) -> Tensor:
    return x * 2 if x.shape[0] != 10 else x


@pytest.mark.parametrize(("between", "longest"), [(chosen, LONGEST), (all_but_the_longest, LONGEST - 1)])
def test_what_holds_for_every_size_is_no_reason_to_refuse(between, longest: int) -> None:
    model = toy(between)
    program = trace(model)
    verify(program)
    assert to_text(parse(to_text(program))) == to_text(program)
    assert [(symbol.low, symbol.high) for symbol in program.symbols] == [(1, 4096), (1, longest)]
    for length in (2, 7, 8, 9, 63):
        ids = torch.randint(0, 40, (3, length))
        torch.testing.assert_close(execute(program, ids), model(ids).logits)


@pytest.mark.parametrize("between", [long_ones_otherwise, large_batches_otherwise, one_batch_otherwise])
def test_a_condition_that_some_sizes_break_is_refused(between) -> None:
    with pytest.raises(TraceError, match="does not hold for every batch and length"):
        trace(toy(between))


@pytest.mark.parametrize("condition", ["seq // 100 != 7", "(batch + 3) % 1000 != 20", "batch * seq != 5000"])
def test_sizes_are_tried_where_the_numbers_of_a_condition_meet(condition: str) -> None:
    near = _near(condition)
    assert not all(
        eval(condition, {"batch": batch, "seq": seq}) for batch in _batches(near) for seq in _lengths(near, 1 << 17)
    )
