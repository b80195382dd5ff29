"""Second moments of what each expert of a layer reads, and how many tokens it got."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from mxfx.calibration.keys import Keys
from mxfx.calibration.statistics import Gram, StaleStatistics, product_of_rows
from mxfx.ground import ranks
from mxfx.ops.catalogue import spec

#: Bytes of second moments that are summed at one time: experts beyond them wait for the next run of the tokens.
BUDGET = {"cuda": 24 << 30, "cpu": 2 << 30}


def expert_ranges(experts: int, columns: int, device: torch.device, moments: int = 1) -> list[range]:
    """Experts whose ``moments`` matrices of ``(columns, columns)`` in float32 fit the budget together."""
    budget = BUDGET.get(device.type, BUDGET["cpu"])
    size = max(1, budget // (4 * moments * columns * columns))
    return [range(start, min(start + size, experts)) for start in range(0, experts, size)]


class ExpertGram:
    """Σ xᵀ x over the rows of each expert in a range, ``(experts, columns, columns)`` in float32 or float64."""

    def __init__(self, experts: range, columns: int, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self._experts = experts
        self._sum = torch.zeros(len(experts), columns, columns, dtype=dtype, device=device)

    def add(self, x: Tensor, experts: Tensor, other: Tensor | None = None) -> None:
        """Add the rows that each expert reads.

        ``x`` is ``(tokens, columns)``, or ``(tokens, chosen, columns)`` with a row for each choice; ``experts``
        ``(tokens, chosen)``. ``other``, of the shape of ``x``, makes the sum Σ xᵀ other.
        """
        order, ends = _sorted(experts, self._experts.stop)
        for place, expert in enumerate(self._experts):
            start, stop = ends[expert], ends[expert + 1]
            if start == stop:
                continue
            chosen = order[start:stop]
            rows = _rows(x, chosen, experts)
            across = rows if other is None else _rows(other, chosen, experts)
            self._sum[place] += product_of_rows(rows, across, self._sum.dtype)

    def value(self) -> Tensor:
        return self._sum


def _sorted(experts: Tensor, stop: int) -> tuple[Tensor, list[int]]:
    """Choices sorted by expert, and where the choices of each expert below ``stop`` begin and end."""
    ordered, order = torch.sort(experts.reshape(-1), stable=True)
    bounds = torch.searchsorted(ordered, torch.arange(stop + 1, device=ordered.device))
    return order, bounds.tolist()


def _rows(x: Tensor, choices: Tensor, experts: Tensor) -> Tensor:
    return x[choices // experts.shape[-1]] if x.dim() == 2 else x.flatten(0, 1)[choices]


def aligned(reference: Tensor, x: Tensor, theirs: Tensor, ours: Tensor) -> Tensor:
    """The rows of a reference run for the choices of this one: its own row where a token took another expert there.

    ``reference`` and ``x`` are ``(tokens, chosen, columns)``, ``theirs`` and ``ours`` the experts ``(tokens,
    chosen)`` of either run. A choice that the reference did not make tells nothing of the error of its input.
    """
    if torch.equal(ours, theirs):
        return reference
    same = ours[:, :, None] == theirs[:, None, :]
    place = same.to(torch.int8).argmax(-1)
    rows = torch.take_along_dim(reference, place[:, :, None], 1)
    return torch.where(same.any(-1, keepdim=True), rows, x.to(rows.dtype))


def choice_of(node: fx.Node) -> fx.Node | None:
    """The node that chooses a product's matrix for each row; None for a product with one matrix."""
    return spec(node).node_of("experts") if spec(node).has("experts") else None


@dataclass(frozen=True)
class ExpertMoments:
    """What was summed for a range of experts.

    ``hits`` counts, for every expert of the layer, the rows that it got; ``rows`` is their sum. ``own`` is Σ xᵀ x of
    each expert in the range, ``cross`` Σ xᵀ x_float; ``shared`` is Σ xᵀ x over all rows whoever reads them, for experts
    that got too few, None where none did.
    """

    experts: range
    hits: tuple[int, ...]
    own: Tensor
    shared: Tensor | None
    cross: Tensor | None

    @property
    def rows(self) -> int:
        return sum(self.hits)

    def locked(self, key: str, data: Mapping[str, object], keys: Keys) -> ExpertStatistics:
        return ExpertStatistics(key, data, self, keys)


@dataclass(frozen=True)
class ExpertStatistics:
    """Moments of a range of experts, locked by the key of what computes the tensor and the choice of experts."""

    key: str
    data: Mapping[str, object]
    _moments: ExpertMoments
    _keys: Keys = field(default_factory=Keys, repr=False, compare=False)

    def moments(self, sources: Sequence[fx.Node], hash_of: Callable[[str], str]) -> ExpertMoments:
        """The moments of what ``sources``, the tensor and the choice, compute with the weights of those hashes.

        Raises ``StaleStatistics`` if that is not what was measured.
        """
        if self._keys.key(sources, hash_of, self.data) != self.key:
            raise StaleStatistics(
                f"the statistics do not describe {sources[0].name}: the graph or a weight upstream of it is not the "
                "one that the calibration stream ran; rewrite a layer only while the stream stands at it"
            )
        return self._moments


Values = Callable[[list[fx.Node]], Iterator[dict[fx.Node, Tensor]]]


def measure_experts(
    values: Values,
    reference: Values | None,
    sources: tuple[fx.Node, fx.Node],
    twins: tuple[fx.Node, fx.Node] | None,
    experts: int,
    fewest: int,
    dtype: torch.dtype = torch.float32,
) -> Iterator[ExpertMoments]:
    """The moments of all experts, range by range, each range from a run over all batches.

    ``values`` gives the nodes' values batch by batch; ``sources`` are the tensor and the choice of experts; ``twins``
    the same in the program that ``reference`` runs.
    """
    source, choice = sources
    hits = _count((batch[choice] for batch in values([choice])), experts)
    ranges: list[range] | None = None
    shared: Gram | None = None
    shared_sum: Tensor | None = None
    number = 0
    while ranges is None or number < len(ranges):
        own: ExpertGram | None = None
        cross: ExpertGram | None = None
        others = None if reference is None or twins is None else reference(list(twins))
        for batch in values([source, choice]):
            x, chosen = batch[source], batch[choice]
            if ranges is None:
                ranges = expert_ranges(experts, x.shape[-1], x.device, 1 if others is None else 2)
                shared = Gram(x.shape[-1], x.device, dtype) if min(hits) < fewest else None
            if own is None:
                own = ExpertGram(ranges[number], x.shape[-1], x.device, dtype)
                cross = None if others is None else ExpertGram(ranges[number], x.shape[-1], x.device, dtype)
            own.add(x, chosen)
            if shared is not None and number == 0:
                shared.add(x)
            if cross is not None and others is not None and twins is not None:
                other = next(others)
                y = other[twins[0]]
                cross.add(x, chosen, y if x.dim() == 2 else aligned(y, x, other[twins[1]], chosen))
        assert own is not None and ranges is not None
        if number == 0 and shared is not None:
            shared_sum = ranks.summed(shared.value())
        yield ExpertMoments(
            ranges[number],
            hits,
            ranks.summed(own.value()),
            # Whole once for all ranges.
            shared_sum,
            None if cross is None else ranks.summed(cross.value()),
        )
        number += 1


def _count(choices: Iterator[Tensor], experts: int) -> tuple[int, ...]:
    total = torch.zeros(experts, dtype=torch.int64)
    for chosen in choices:
        total += torch.bincount(chosen.reshape(-1), minlength=experts).cpu()
    return tuple(ranks.summed(total).tolist())
