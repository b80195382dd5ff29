"""``allocate-bits``: more bits where rounding costs most, fewer where it costs least, within budgets."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from torch import fx

from mxfx.algorithms.allocation import Choice, allocate
from mxfx.calibration.expert_statistics import choice_of
from mxfx.calibration.sensitivity import Operands, kl_of_rounding
from mxfx.calibration.spread import concatenated, parts
from mxfx.calibration.training import divergence, trainable
from mxfx.formats import Format, parse
from mxfx.graph.node import Annotation, info, layer_of, path_of
from mxfx.graph.program import Program
from mxfx.graph.regions import siblings
from mxfx.ground.files import write_file
from mxfx.ops.catalogue import spec
from mxfx.rewrite import ALL, Context, Exact, Numerics, Pass, Rewriter, Selector, register
from mxfx.rewrite.facts import ACTIVATIONS_QUANTIZED, ANNOTATED, LOWERED, WEIGHTS_ROUNDED, Fact

#: Budgets that the curve is drawn through.
_BUDGETS = 40
_FORMATS = tuple(parse(f"mxint{bits}@32/mse") for bits in (3, 4, 5, 6, 8))


@register
@dataclass(frozen=True)
class AllocateBits(Pass):
    """Give every annotated linear one of several formats, so that the mean bits of a weight keep a budget.

    Before::

        %y = linear(%x, @w)      {weight: mxint4@32/mse, input: mxint4@32/mse}

    After::

        %y = linear(%x, @w)      {weight: mxint5@32/mse, input: mxint5@32/mse}

    What each format costs at each linear is its share of KL to the float model, from one pass over calibration tokens
    with gradients (``mxfx.calibration.sensitivity``); the choice is a knapsack. Linears that read one tensor take one
    format, for their input is rounded once. Weight and input of a linear get the same format, where ``annotate`` gave
    them one: the budget is of weights, and inputs follow.

    With ``input_bits`` weights and inputs are chosen apart, each within a budget of its own. Costs are then those of
    rounding one operand alone, measured in the same pass, and are taken to add up; every linear's weight has a format
    of its own, and a tensor that several linears read has one as their input. An input's bits count as often as it is
    multiplied: a tensor of 64 channels that 1000 rows read weighs as much as one of 640 that 100 rows read. Either
    choice loses no more, against the best within its budget, than the first exchange that the budget did not hold
    would save.

    The report has the choice, what it was predicted to cost and what it costs, and the curves of the best choices over
    budgets; ``freeze`` writes the choice as the rules of an ``annotate`` that needs no data.

    bits: budget, mean bits of the chosen weights with their shared scales; linears that are not selected are outside.
    size: the budget as bytes of the same instead, of all of them together; not given: ``bits`` is it.
    formats: what may be chosen.
    input_bits: budget of inputs, mean bits of an input over the multiplications of the chosen linears, with shared
        scales; not given: an input has the format of its linear's weight.
    input_formats: what may be chosen for inputs, with ``input_bits``; not given: ``formats``.
    samples: calibration samples that costs are measured on.
    freeze: file that the choice is written to, as TOML.
    """

    name: ClassVar[str] = "allocate-bits"
    requires: ClassVar[frozenset[Fact]] = frozenset({ANNOTATED})
    forbids: ClassVar[frozenset[Fact]] = frozenset({WEIGHTS_ROUNDED, ACTIVATIONS_QUANTIZED, LOWERED})
    numerics: ClassVar[Numerics] = Exact()
    bits: float = 4.5
    size: int | None = None
    formats: tuple[Format, ...] = _FORMATS
    input_bits: float | None = None
    input_formats: tuple[Format, ...] | None = None
    samples: int = 16
    freeze: Path | None = None
    select: Selector = ALL

    def __post_init__(self) -> None:
        if not self.formats:
            raise ValueError("'formats' is empty, expected two or more")
        least = min(fmt.bits_per_element for fmt in self.formats)
        if self.size is None and self.bits < least:
            raise ValueError(f"'bits' is {self.bits}, and no format takes less than {least:g}")
        if self.samples < 1:
            raise ValueError(f"'samples' is {self.samples}, must be at least 1")
        if self.input_bits is None:
            if self.input_formats is not None:
                raise ValueError("'input_formats' are chosen among under 'input_bits': give that budget too")
            return
        if not self._input_formats:
            raise ValueError("'input_formats' is empty, expected two or more")
        least = min(fmt.bits_per_element for fmt in self._input_formats)
        if self.input_bits < least:
            raise ValueError(f"'input_bits' is {self.input_bits}, and no format of inputs takes less than {least:g}")

    @property
    def _input_formats(self) -> tuple[Format, ...]:
        return self.formats if self.input_formats is None else self.input_formats

    def run(self, rw: Rewriter, ctx: Context) -> None:
        sites = [site for site in self._sites(rw) if rw.match(site[0], note=f"{len(site)} linears")]
        if not sites:
            rw.warn("nothing to choose: no selected linear has a weight format")
            return
        sides = self._together(rw, ctx, sites) if self.input_bits is None else self._apart(rw, ctx, sites)
        chosen = {operand: fmt for side in sides for operand, fmt in side.choose().items()}
        measured = self._measured(rw.program, chosen, ctx)
        linears = {linear.name: linear for site in sites for linear in site}
        for (name, operand), fmt in chosen.items():
            linear = linears[name]
            rw.set_info(linear, info(linear).with_format(operand, Annotation(fmt, self.name)))
        self._account(rw, sites, sides, chosen, measured)

    def _together(self, rw: Rewriter, ctx: Context, sites: list[list[fx.Node]]) -> list[_Side]:
        """One choice for weights and inputs."""
        costs: dict[str, list[float]] = {}
        for rounds, alike in _by_input([linear for site in sites for linear in site]):
            operands = [Operands(fmt, fmt if rounds else None) for fmt in self.formats]
            costs |= kl_of_rounding(rw.program, alike, operands, ctx.tokens()[: self.samples], ctx)
        units = [
            _Unit(
                tuple(site),
                tuple((n.name, operand) for n in site for operand in ("weight", "input") if operand in info(n).formats),
                sum(_weights(rw, n) for n in site),
                [sum(costs[n.name][index] for n in site) for index in range(len(self.formats))],
            )
            for site in sites
        ]
        return [_Side(self.formats, units, self._budget(units))]

    def _apart(self, rw: Rewriter, ctx: Context, sites: list[list[fx.Node]]) -> list[_Side]:
        """A choice for weights, and one for inputs where there are any."""
        linears = [linear for site in sites for linear in site]
        operands = [Operands(fmt, None) for fmt in self.formats]
        operands += [Operands(None, fmt) for fmt in self._input_formats]
        costs = kl_of_rounding(rw.program, linears, operands, ctx.tokens()[: self.samples], ctx)
        count = len(self.formats)
        units = [_Unit((n,), ((n.name, "weight"),), _weights(rw, n), costs[n.name][:count]) for n in linears]
        sides = [_Side(self.formats, units, self._budget(units))]
        inputs = []
        for site in sites:
            if readers := [n for n in site if "input" in info(n).formats]:
                losses = [sum(of) for of in zip(*(costs[n.name][count:] for n in readers), strict=True)]
                names = tuple((n.name, "input") for n in readers)
                inputs.append(_Unit(tuple(readers), names, sum(_products(rw, n) for n in readers), losses))
        if not inputs:
            rw.warn("'input_bits' has nothing to choose: no selected linear has an input format")
            return sides
        assert self.input_bits is not None
        budget = self.input_bits * sum(unit.size for unit in inputs)
        return [*sides, _Side(self._input_formats, inputs, budget)]

    def _budget(self, units: list[_Unit]) -> float:
        """Bits of all chosen weights together."""
        weights = sum(unit.size for unit in units)
        if self.size is None:
            return self.bits * weights
        least = weights * min(fmt.bits_per_element for fmt in self.formats)
        if 8 * self.size < least:
            raise ValueError(
                f"'size' is {self.size:,} bytes, and these weights take {int(-(-least // 8)):,} at the least"
            )
        return 8.0 * self.size

    def _measured(self, program: Program, chosen: Mapping[tuple[str, str], Format], ctx: Context) -> float:
        """KL in nats a token to the program as it is, on the same samples, where all is rounded as chosen."""
        whole = trainable(program, {}, ctx.device)[0]
        rounded = program.copy()
        rw = Rewriter(rounded, self.name)
        for node in list(rounded.products()):
            for operand in ("weight", "input"):
                if (fmt := chosen.get((node.name, operand))) is not None:
                    source = spec(node).node_of(operand)
                    assert source is not None
                    new = rw.call(torch.ops.mxfx.fake_quantize.default, source, str(fmt), -1, like=node)
                    spec(node).set(rw, operand, new)
        other = trainable(rounded, {}, ctx.device)[0]
        with torch.no_grad():
            batches = [part.ids.to(ctx.device) for part in parts(ctx.tokens()[: self.samples], 1)]
            found = [divergence(other(ids), whole(ids)) for ids in batches]
        of_all = concatenated(torch.stack(found) if found else None, 0, ctx.device)
        assert of_all is not None
        return float(of_all.mean())

    def _sites(self, rw: Rewriter) -> list[list[fx.Node]]:
        """Linears that read one tensor and carry formats, together."""
        found = []
        for linears in siblings(rw.program).values():
            chosen = [n for n in linears if self.select(n) and "weight" in info(n).formats]
            if chosen:
                found.append(chosen)
        return found

    def _account(
        self,
        rw: Rewriter,
        sites: list[list[fx.Node]],
        sides: list[_Side],
        chosen: Mapping[tuple[str, str], Format],
        measured: float,
    ) -> None:
        weights, *others = sides
        predicted = sum(side.loss for side in sides)
        here = {"bits": weights.bits} | ({"input_bits": others[0].bits} if others else {}) | {"predicted_kl": predicted}
        shared = [fmt for fmt in self.formats if all(fmt in side.formats for side in others)]
        uniform = {
            str(fmt): {"bits": fmt.bits_per_element, "predicted_kl": sum(side.uniform(fmt) for side in sides)}
            for fmt in shared
        }
        toml = _rules(sites, chosen)
        rw.record.details |= {**here, "measured_kl": measured, "uniform": uniform}
        for side in sides:
            # Beside the best choices of one operand stands what the other was chosen to cost.
            rest = predicted - side.loss
            points = {
                "chosen": {"bits": side.bits, "predicted_kl": predicted},
                "chosen, measured": {"bits": side.bits, "kl": measured},
            }
            bits, sites_of = ("bits", "sites") if side is weights else ("input_bits", "inputs")
            rows = side.rows()
            rw.record.details |= {
                f"kl_over_{bits}": {"curve": side.frontier(rest), "points": points | uniform},
                f"{bits}_over_layers": {"bars": side.by_layer()},
                sites_of: rows,
                f"{sites_of}_by_format": dict(Counter(str(row["format"]) for row in rows)),
            }
        rw.record.details["toml"] = toml
        if self.freeze is not None:
            write_file(self.freeze, toml.encode())


@dataclass(frozen=True)
class _Unit:
    """What takes one format: ``operands``, by name of a linear and of its operand; ``size`` elements count for it, and
    ``losses`` has the KL of each format.
    """

    linears: tuple[fx.Node, ...]
    operands: tuple[tuple[str, str], ...]
    size: int
    losses: list[float]


@dataclass(frozen=True)
class _Side:
    """Units that are chosen for under one ``budget``, in bits of all their elements."""

    formats: tuple[Format, ...]
    units: list[_Unit]
    budget: float

    @cached_property
    def items(self) -> list[list[Choice]]:
        return [
            [
                Choice(unit.size * fmt.bits_per_element, loss)
                for fmt, loss in zip(self.formats, unit.losses, strict=True)
            ]
            for unit in self.units
        ]

    @cached_property
    def taken(self) -> list[int]:
        """Index of the format of each unit."""
        return allocate(self.items, self.budget)

    def choose(self) -> dict[tuple[str, str], Format]:
        found = zip(self.units, self.taken, strict=True)
        return {operand: self.formats[index] for unit, index in found for operand in unit.operands}

    @property
    def size(self) -> int:
        return sum(unit.size for unit in self.units)

    @property
    def bits(self) -> float:
        """Mean bits of an element as chosen."""
        return sum(choices[i].cost for choices, i in zip(self.items, self.taken, strict=True)) / self.size

    @property
    def loss(self) -> float:
        """KL as chosen, by prediction."""
        return sum(choices[i].loss for choices, i in zip(self.items, self.taken, strict=True))

    def uniform(self, fmt: Format) -> float:
        """KL of one format everywhere, by prediction."""
        return sum(unit.losses[self.formats.index(fmt)] for unit in self.units)

    def frontier(self, rest: float) -> list[list[float]]:
        """Bits and predicted KL of the best choices, ``rest`` added to it."""
        return [[bits, loss + rest] for bits, loss in _frontier(self.items, self.size)]

    def rows(self) -> list[dict[str, object]]:
        return [
            {
                "linears": [path_of(n) for n in unit.linears],
                "layer": layer_of(unit.linears[0]),
                "format": str(self.formats[index]),
                "predicted_kl": {str(f): loss for f, loss in zip(self.formats, unit.losses, strict=True)},
            }
            for unit, index in zip(self.units, self.taken, strict=True)
        ]

    def by_layer(self) -> dict[str, float]:
        """Mean bits of an element in each layer, and of those outside them."""
        spent: dict[str, float] = defaultdict(float)
        elements: dict[str, int] = defaultdict(int)
        for unit, choices, index in zip(self.units, self.items, self.taken, strict=True):
            number = layer_of(unit.linears[0])
            layer = "no layer" if number is None else f"layer {number}"
            spent[layer] += choices[index].cost
            elements[layer] += unit.size
        return {layer: spent[layer] / elements[layer] for layer in spent}


def _weights(rw: Rewriter, linear: fx.Node) -> int:
    return rw.weights[rw.program.weight_of(linear)].numel()


def _products(rw: Rewriter, linear: fx.Node) -> int:
    """Multiplications of a token: of a stack, by the experts that it chooses."""
    rows, columns = rw.weights[rw.program.weight_of(linear)].shape[-2:]
    choice = choice_of(linear)
    return rows * columns * (1 if choice is None else int(choice.meta["val"].shape[-1]))


def _frontier(items: list[list[Choice]], total: int) -> list[list[float]]:
    """Bits and predicted KL of the best choices under budgets from the cheapest formats to the dearest."""
    low, high = (sum(best(c.cost for c in choices) for choices in items) for best in (min, max))
    found: list[list[float]] = []
    for step in range(_BUDGETS + 1):
        chosen = allocate(items, low + (high - low) * step / _BUDGETS)
        costs, losses = zip(*((c[i].cost, c[i].loss) for c, i in zip(items, chosen, strict=True)), strict=True)
        point = [sum(costs) / total, sum(losses)]
        if not found or point != found[-1]:
            found.append(point)
    return found


def _by_input(linears: list[fx.Node]) -> list[tuple[bool, list[fx.Node]]]:
    """The linears whose input has a format, and those whose weight alone has one; neither group is empty."""
    groups: dict[bool, list[fx.Node]] = {}
    for linear in linears:
        groups.setdefault("input" in info(linear).formats, []).append(linear)
    return list(groups.items())


def _rules(sites: list[list[fx.Node]], chosen: Mapping[tuple[str, str], Format]) -> str:
    """The choice as an ``annotate`` that needs no data: one rule for linears of a site that have the same formats."""
    lines = ["[[pass]]", 'name = "annotate"']
    for site in sites:
        alike: dict[tuple[Format, Format | None], list[fx.Node]] = {}
        for linear in site:
            formats = (chosen[linear.name, "weight"], chosen.get((linear.name, "input")))
            alike.setdefault(formats, []).append(linear)
        for (of_weight, of_input), linears in alike.items():
            paths = "|".join(path_of(linear).replace(".", r"\.") for linear in linears)
            lines += ["  [[pass.rule]]", f"  match = '{paths}'", f'  weight = "{of_weight}"']
            lines += [] if of_input is None else [f'  input = "{of_input}"']
            lines += [f'  expect = "{len(linears)}"']
    return "\n".join(lines) + "\n"
