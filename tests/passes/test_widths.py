"""Transforms on axes that the asked block does not divide: the largest order that divides both, and it is said."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from mxfx.algorithms.block_transform import best_order, narrow, wush
from mxfx.algorithms.hadamard import fitting_order, has_hadamard, order_words, orders_near
from mxfx.formats import parse
from mxfx.graph.program import Program
from mxfx.graph.tiny import tiny
from mxfx.graph.trace import trace
from mxfx.passes import (
    Annotate,
    OnlineRotation,
    RotateQk,
    RotateValue,
    Rule,
    TransformInputs,
    TransformKv,
    TransformSearch,
)
from mxfx.rewrite import Pass, Rewriter, apply
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


class TestBlocksNearTheOneThatIsAsked:
    """Where it does not divide the axis and data tell orders apart, that of the least error is taken, and said."""

    @pytest.mark.parametrize(
        ("width", "wanted", "orders"),
        [(64, 32, (32,)), (48, 32, (16, 24, 48)), (80, 32, (16, 20, 40)), (176, 32, (16, 44)), (36, 32, (36,)),
         (80, 0, (80,)), (38, 32, ()), (16 * 11, 128, (16, 88, 176))],
    )  # fmt: skip
    def test_orders(self, width: int, wanted: int, orders: tuple[int, ...]) -> None:
        assert orders_near(width, wanted) == orders

    @pytest.mark.parametrize("width", [48, 80, 176])
    def test_the_least_expected_error_is_the_least_error(self, width: int) -> None:
        """Against rounding both operands of a product, over several: near the best of the orders, below the fitting."""
        of_best, of_fitting = [], []
        for seed in range(6):
            x, w = _operands(width, seed)
            of_x, of_w = (x.mT @ x / len(x))[None], (w.mT @ w / len(w))[None]
            errors = {}
            for order in orders_near(width, 32):
                found = wush(narrow(of_x, order), narrow(of_w, order))
                rounded = [
                    parse("mxint4@32/mse").fake_quantize(part) for part in (found.activations(x), found.weight(w))
                ]
                errors[order] = float((rounded[0] @ rounded[1].mT - x @ w.mT).square().sum())
            chosen = best_order(of_x, of_w, orders_near(width, 32), width, 32)
            of_best.append(errors[chosen] / min(errors.values()))
            of_fitting.append(errors[chosen] / errors[fitting_order(width, 32)])
        assert sum(of_best) / 6 < 1.05
        assert sum(of_fitting) / 6 < 0.95

    def test_a_channel_that_is_always_zero_does_not_decide(self) -> None:
        moment = torch.eye(48, dtype=torch.float64)[None]
        moment[:, :24] = 0
        assert best_order(moment, moment, (16, 24, 48), 48, 32) in (24, 48)

    def test_passes_say_before_and_after_what_is_taken(self, preserved) -> None:
        given = program(80, 176, 48)
        rules = Annotate((Rule(role="attention, mlp", weight=M4, input=M4), Rule(role="attention", kv=M4)))
        given = apply(rules, given).program
        foreseen = Rewriter(given, "transform-inputs")
        assert TransformInputs(kind="wush").foresee(foreseen) == 4
        notes = {match.note for match in foreseen.record.matches}
        assert notes == {
            "wush 16 or 20 or 40 (32 does not divide 80)", "wush 32", "wush 16 or 44 (32 does not divide 176)",
        }  # fmt: skip
        _, record = preserved(TransformInputs(kind="wush"), given)
        blocks = {d["block"] for d in record.details.values()}
        assert {int(match.note.split()[1].rstrip(";")) for match in record.matches} == blocks
        assert blocks <= {16, 20, 40, 32, 44} and 32 in blocks
        _, record = preserved(TransformKv(kind="wush"), given)
        assert all(re.search("wush (16|24|48) .32 does not divide 48.", match.note) for match in record.matches)
        _, record = preserved(TransformSearch(candidates=("none", "wush-32")), given)
        sites = record.details["sites"]
        assert {d["multiplications_per_token"] for d in sites.values() if d["chosen"] == "none"} <= {0}
        assert {d["blocks"]["wush-32"] for d in sites.values()} == blocks


def _operands(width: int, seed: int) -> tuple[Tensor, Tensor]:
    """Activations of correlated channels of unlike size, and a weight that reads them, float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    size = (1.2 * normal(width)).exp()
    size[::40] *= 15
    x = normal(2048, width) @ (torch.eye(width) + 0.7 * normal(width, width) / width**0.5) * size
    return x, normal(256, width) @ (torch.eye(width) + 0.5 * normal(width, width) / width**0.5)
