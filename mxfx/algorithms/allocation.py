"""Choosing one of several formats for each site under a budget: a knapsack in which every site takes one item."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Choice:
    """One item of a site: what it costs, and what is lost with it."""

    cost: float
    loss: float


def allocate(sites: Sequence[Sequence[Choice]], budget: float) -> list[int]:
    """Index of the item that each site takes; the costs sum to at most ``budget``.

    Every site begins with its cheapest item. Then the exchange that saves most loss for its cost is made, again and
    again, while the budget holds it (greedy on each site's lower convex hull: the best solution of the relaxed
    problem but for the last exchange; Sinha and Zoltners, Operations Research 27, 1979).

    Raises ``ValueError`` if even the cheapest items exceed the budget, or a loss is not finite.
    """
    for site, items in enumerate(sites):
        losses = [item.loss for item in items]
        if not all(map(math.isfinite, losses)):
            raise ValueError(f"the losses of site {site} are {losses}: not all are finite")
    hulls = [_hull(items) for items in sites]
    taken = [hull[0] for hull in hulls]
    spent = sum(items[index].cost for items, index in zip(sites, taken, strict=True))
    if spent > budget * (1 + 1e-12):
        raise ValueError(f"the cheapest choice of every site costs {spent:g}, the budget is {budget:g}")
    waiting: list[tuple[float, int, int]] = []
    for site, hull in enumerate(hulls):
        _offer(waiting, sites[site], hull, site, 0)
    while waiting:
        _, site, step = heapq.heappop(waiting)
        items, hull = sites[site], hulls[site]
        extra = items[hull[step + 1]].cost - items[hull[step]].cost
        if spent + extra > budget * (1 + 1e-12):
            # A dearer step of this site cannot fit either; cheaper ones of others still may.
            continue
        spent += extra
        taken[site] = hull[step + 1]
        _offer(waiting, items, hull, site, step + 1)
    return taken


def _offer(waiting: list, items: Sequence[Choice], hull: list[int], site: int, step: int) -> None:
    if step + 1 < len(hull):
        here, there = items[hull[step]], items[hull[step + 1]]
        heapq.heappush(waiting, (-(here.loss - there.loss) / (there.cost - here.cost), site, step))


def _hull(items: Sequence[Choice]) -> list[int]:
    """Items on the lower convex hull of loss over cost, by index, cheapest first; each loses less than the last."""
    order = sorted(range(len(items)), key=lambda i: (items[i].cost, items[i].loss))
    hull: list[int] = []
    for index in order:
        if hull and items[index].loss >= items[hull[-1]].loss:
            continue
        while len(hull) > 1 and _slope(items, hull[-2], hull[-1]) <= _slope(items, hull[-1], index):
            hull.pop()
        hull.append(index)
    return hull


def _slope(items: Sequence[Choice], a: int, b: int) -> float:
    return (items[a].loss - items[b].loss) / (items[b].cost - items[a].cost)
