"""Moments of experts: those of the rows that each one reads, whatever the ranges that they are summed in."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, fx

from mxfx.calibration import expert_statistics as module
from mxfx.calibration.expert_statistics import aligned, measure_experts

COLUMNS, EXPERTS = 8, 5


def _batches(own: bool) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for tokens in (7, 4):
        shape = (tokens, 2, COLUMNS) if own else (tokens, COLUMNS)
        # Nobody chooses expert 3.
        chosen = torch.stack(
            [torch.tensor([0, 1, 2, 4])[torch.randperm(4, generator=generator)[:2]] for _ in range(tokens)]
        )
        found.append((torch.randn(shape, generator=generator), chosen))
    return found


def _nodes() -> tuple[fx.Node, fx.Node]:
    graph = fx.Graph()
    return graph.placeholder("x"), graph.placeholder("chosen")


def _rows(batches: list[tuple[Tensor, Tensor]], expert: int) -> Tensor:
    rows = [
        x[t] if x.dim() == 2 else x[t, j]
        for x, chosen in batches
        for t in range(len(chosen))
        for j in range(2)
        if chosen[t, j] == expert
    ]
    return torch.stack(rows) if rows else torch.zeros(0, COLUMNS)


@pytest.mark.parametrize("own", [False, True], ids=["row of the token", "row of the choice"])
@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_moments_are_those_of_the_rows_of_each_expert(monkeypatch: pytest.MonkeyPatch, own: bool, at_once: int) -> None:
    monkeypatch.setitem(module.BUDGET, "cpu", 4 * at_once * COLUMNS**2)
    batches, (x, chosen) = _batches(own), _nodes()

    def values(nodes: list[fx.Node]) -> Iterator[dict[fx.Node, Tensor]]:
        for a, b in batches:
            yield {node: {x: a, chosen: b}[node] for node in nodes}

    parts = list(measure_experts(values, None, (x, chosen), None, EXPERTS, 1, torch.float64))
    assert [part.experts for part in parts] == [range(s, min(s + at_once, EXPERTS)) for s in range(0, EXPERTS, at_once)]
    every = torch.cat([a.reshape(-1, COLUMNS) for a, _ in batches]).double()
    for part in parts:
        assert part.hits == tuple(len(_rows(batches, e)) for e in range(EXPERTS))
        assert part.shared is not None and torch.allclose(part.shared, every.mT @ every)
        for place, expert in enumerate(part.experts):
            rows = _rows(batches, expert).double()
            assert torch.allclose(part.own[place], rows.mT @ rows)


def test_all_rows_are_summed_only_where_an_expert_starves() -> None:
    batches, (x, chosen) = _batches(False), _nodes()

    def values(nodes: list[fx.Node]) -> Iterator[dict[fx.Node, Tensor]]:
        for a, b in batches:
            yield {node: {x: a, chosen: b}[node] for node in nodes}

    (part,) = measure_experts(values, None, (x, chosen), None, EXPERTS, 0, torch.float64)
    assert part.shared is None


def test_a_choice_that_the_reference_did_not_make_has_no_error() -> None:
    ours, theirs = torch.tensor([[0, 2], [1, 3]]), torch.tensor([[2, 0], [1, 4]])
    x, reference = torch.zeros(2, 2, 1), torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]])
    assert aligned(reference, x, theirs, ours).flatten().tolist() == [2.0, 1.0, 3.0, 0.0]
