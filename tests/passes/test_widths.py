"""Transforms on axes that the asked block does not divide: the largest order that divides both, and it is said."""

from __future__ import annotations

import pytest
import torch

from mxfx.algorithms.hadamard import fitting_order, has_hadamard, order_words
from mxfx.formats import parse
from mxfx.graph.program import Program
from mxfx.graph.tiny import tiny
from mxfx.graph.trace import trace
from mxfx.passes import Annotate, OnlineRotation, RotateQk, RotateValue, Rule, TransformInputs, TransformKv
from mxfx.rewrite import Pass, apply
from tests.programs import RAISE, passed

M4 = parse("mxint4@32")
#: Hidden size, intermediate size, head dimension: of several models in use, and of none.
SIZES = [(576, 1536, 64), (640, 96, 80), (80, 48, 96), (48, 144, 48), (176, 80, 48)]


def program(hidden: int, intermediate: int, head: int) -> Program:
    model = tiny(
        "llama-tiny", layers=1, dtype=torch.float64, hidden_size=hidden, intermediate_size=intermediate, head_dim=head
    )
    return passed(trace(model).twin(torch.float64), RAISE)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_site_gets_a_transform_and_no_number_changes(sizes, preserved) -> None:
    given = program(*sizes)
    rules = Annotate((Rule(role="attention, mlp", input=M4), Rule(role="attention", kv=M4)))
    passes: list[tuple[Pass, int]] = [
        (TransformInputs(kind="wush"), 4), (TransformKv(kind="wush"), 2), (RotateQk(block=32), 1),
        (RotateValue(block=32), 1), (OnlineRotation(sites=("linear", "kv_cache"), block=32), 9),
    ]  # fmt: skip
    for pass_, sites in passes:
        _, record = preserved(pass_, apply(rules, given).program)
        assert len(record.matches) == sites, pass_.name
        assert not any("order" in skip.reason for skip in record.skips)


def test_the_order_that_was_taken_is_said() -> None:
    record = apply(TransformInputs(block=64), program(80, 96, 48)).record
    orders = {match.note.partition(";")[0] for match in record.matches}
    assert orders == {
        "hadamard 16 (64 does not divide 80)", "hadamard 64", "hadamard 32 (64 does not divide 96)",
    }  # fmt: skip


@pytest.mark.parametrize("width", [16 * k for k in range(1, 41)])
def test_every_multiple_of_16_takes_blocks_of_16_or_more(width: int) -> None:
    for wanted in (16, 32, 64, 128, 0):
        order = fitting_order(width, wanted)
        assert order is not None and order >= 16
        assert width % order == 0 and has_hadamard(order) and (not wanted or wanted % order == 0)


def test_what_no_order_fits_and_how_it_is_said() -> None:
    assert fitting_order(36, 32) is None and fitting_order(4, 4) == 4
    assert order_words(64, 0, 64) == "64"
    assert order_words(38, 0, 2) == "2 (no matrix of 38)"
