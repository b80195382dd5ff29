"""Choosing formats under a budget: against every possible choice of small cases."""

from __future__ import annotations

import itertools
import random

import pytest

from mxfx.algorithms.allocation import Choice, allocate


def _sites(seed: int, count: int = 5, items: int = 4) -> list[list[Choice]]:
    """Sites whose loss falls by about a quarter for each unit of cost, as rounding does with each bit."""
    draw = random.Random(seed)
    sites = []
    for _ in range(count):
        size, weight = draw.choice([1, 2, 3]), draw.random()
        sites.append([Choice(size * (i + 3), weight * draw.uniform(0.8, 1.2) * 0.25**i) for i in range(items)])
    return sites


@pytest.mark.parametrize("seed", range(20))
def test_within_the_budget_it_is_almost_the_best_of_all_choices(seed: int) -> None:
    sites = _sites(seed)
    budget = 1.3 * sum(site[0].cost for site in sites)
    found = allocate(sites, budget)
    everything = [
        (sum(site[i].loss for site, i in zip(sites, indices, strict=True)))
        for indices in itertools.product(range(4), repeat=len(sites))
        if sum(site[i].cost for site, i in zip(sites, indices, strict=True)) <= budget
    ]
    assert sum(site[i].cost for site, i in zip(sites, found, strict=True)) <= budget
    # The greedy solution is off by less than what one last exchange would save.
    last = max(site[0].loss for site in sites)
    assert sum(site[i].loss for site, i in zip(sites, found, strict=True)) <= min(everything) + last
    assert sum(site[i].loss for site, i in zip(sites, found, strict=True)) <= 1.5 * min(everything)


def test_a_budget_for_everything_takes_the_best_of_each() -> None:
    sites = _sites(0)
    assert allocate(sites, 1e9) == [3] * 5


def test_a_budget_for_nothing_more_takes_the_cheapest() -> None:
    sites = _sites(0)
    assert allocate(sites, sum(site[0].cost for site in sites)) == [0] * 5


def test_a_dearer_item_that_loses_more_is_never_taken() -> None:
    assert allocate([[Choice(4, 1.0), Choice(5, 2.0), Choice(6, 0.5)]], 100) == [2]


def test_a_budget_below_the_cheapest_is_refused() -> None:
    with pytest.raises(ValueError, match="the cheapest choice of every site costs 4, the budget is 3"):
        allocate([[Choice(4, 1.0)]], 3)


def test_a_loss_that_is_not_finite_is_named() -> None:
    """Each comparison with NaN is false: whatever was chosen would be chosen by chance."""
    with pytest.raises(ValueError, match=r"the losses of site 1 are \[1.0, nan\]"):
        allocate([[Choice(1, 2.0), Choice(2, 1.0)], [Choice(1, 1.0), Choice(2, float("nan"))]], 4)
