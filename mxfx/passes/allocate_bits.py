"""``allocate-bits``: more bits where rounding costs most, fewer where it costs least, within a budget."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import fx

from mxfx.algorithms.allocation import Choice, allocate
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
    them one. The report has the choice, what it was predicted to cost and what it costs, and the curve of the best
    choices over budgets; ``freeze`` writes the choice as the rules of an ``annotate`` that needs no data.

    bits: budget, mean bits of the chosen weights with their shared scales; linears that are not selected are outside.
    size: the budget as bytes of the same instead, of all of them together; not given: ``bits`` is it.
    formats: what may be chosen.
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

    def run(self, rw: Rewriter, ctx: Context) -> None:
        sites = [site for site in self._sites(rw) if rw.match(site[0], note=f"{len(site)} linears")]
        if not sites:
            rw.warn("nothing to choose: no selected linear has a weight format")
            return
        linears = [linear for site in sites for linear in site]
        costs: dict[str, list[float]] = {}
        for rounds, alike in _by_input(linears):
            operands = [Operands(fmt, fmt if rounds else None) for fmt in self.formats]
            costs |= kl_of_rounding(rw.program, alike, operands, ctx.tokens()[: self.samples], ctx)
        sizes = [sum(rw.weights[rw.program.weight_of(n)].numel() for n in site) for site in sites]
        items = [
            [
                Choice(size * fmt.bits_per_element, sum(costs[n.name][index] for n in site))
                for index, fmt in enumerate(self.formats)
            ]
            for site, size in zip(sites, sizes, strict=True)
        ]
        chosen = allocate(items, self._budget(items, sum(sizes)))
        measured = self._measured(rw.program, sites, chosen, ctx)
        for site, index in zip(sites, chosen, strict=True):
            for linear in site:
                _set(rw, linear, self.formats[index])
        self._account(rw, sites, items, chosen, sizes, measured)

    def _budget(self, items: list[list[Choice]], weights: int) -> float:
        """Bits of all chosen weights together."""
        if self.size is None:
            return self.bits * weights
        least = sum(min(choice.cost for choice in choices) for choices in items)
        if 8 * self.size < least:
            raise ValueError(
                f"'size' is {self.size:,} bytes, and these weights take {int(-(-least // 8)):,} at the least"
            )
        return 8.0 * self.size

    def _measured(self, program: Program, sites: list[list[fx.Node]], chosen: list[int], ctx: Context) -> float:
        """KL in nats a token to the program as it is, on the same samples, where all sites are rounded as chosen."""
        formats = {n.name: self.formats[i] for site, i in zip(sites, chosen, strict=True) for n in site}
        whole = trainable(program, {}, ctx.device)[0]
        rounded = program.copy()
        rw = Rewriter(rounded, self.name)
        for node in rounded.products():
            if node.name in formats:
                fmt = formats[node.name]
                for operand in {"weight", "input"} & set(info(node).formats):
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
        items: list[list[Choice]],
        chosen: list[int],
        sizes: list[int],
        measured: float,
    ) -> None:
        rows = [
            {
                "linears": [path_of(n) for n in site],
                "layer": layer_of(site[0]),
                "format": str(self.formats[index]),
                "predicted_kl": {str(f): c.loss for f, c in zip(self.formats, choices, strict=True)},
            }
            for site, choices, index in zip(sites, items, chosen, strict=True)
        ]
        total = sum(sizes)
        costs = [choices[i].cost for choices, i in zip(items, chosen, strict=True)]
        here = {"bits": sum(costs) / total}
        here["predicted_kl"] = sum(choices[i].loss for choices, i in zip(items, chosen, strict=True))
        uniform: dict[str, dict[str, float]] = {
            str(fmt): {"bits": fmt.bits_per_element, "predicted_kl": sum(choices[i].loss for choices in items)}
            for i, fmt in enumerate(self.formats)
        }
        toml = _rules(sites, [self.formats[index] for index in chosen])
        points = {"chosen": here, "chosen, measured": {"bits": here["bits"], "kl": measured}} | uniform
        rw.record.details |= {
            **here,
            "measured_kl": measured,
            "uniform": uniform,
            "kl_over_bits": {"curve": _frontier(items, total), "points": points},
            "bits_over_layers": {"bars": _by_layer(rows, costs, sizes)},
            "sites": rows,
            "sites_by_format": dict(Counter(row["format"] for row in rows)),
            "toml": toml,
        }
        if self.freeze is not None:
            write_file(self.freeze, toml.encode())


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


def _by_layer(rows: list[dict[str, object]], costs: list[float], sizes: list[int]) -> dict[str, float]:
    """Mean bits of a weight in each layer, and of those outside them."""
    spent: dict[str, float] = defaultdict(float)
    weights: dict[str, int] = defaultdict(int)
    for row, cost, size in zip(rows, costs, sizes, strict=True):
        layer = "no layer" if row["layer"] is None else f"layer {row['layer']}"
        spent[layer] += cost
        weights[layer] += size
    return {layer: spent[layer] / weights[layer] for layer in spent}


def _set(rw: Rewriter, linear: fx.Node, fmt: Format) -> None:
    record = info(linear)
    for operand in ("weight", "input"):
        if operand in record.formats:
            record = record.with_format(operand, Annotation(fmt, "allocate-bits"))
    rw.set_info(linear, record)


def _by_input(linears: list[fx.Node]) -> list[tuple[bool, list[fx.Node]]]:
    """The linears whose input has a format, and those whose weight alone has one; neither group is empty."""
    groups: dict[bool, list[fx.Node]] = {}
    for linear in linears:
        groups.setdefault("input" in info(linear).formats, []).append(linear)
    return list(groups.items())


def _rules(sites: list[list[fx.Node]], formats: list[Format]) -> str:
    """The choice as an ``annotate`` that needs no data: one rule for each site, two where inputs differ."""
    lines = ["[[pass]]", 'name = "annotate"']
    for site, fmt in zip(sites, formats, strict=True):
        for rounds, linears in _by_input(site):
            paths = "|".join(path_of(linear).replace(".", r"\.") for linear in linears)
            lines += ["  [[pass.rule]]", f"  match = '{paths}'", f'  weight = "{fmt}"']
            lines += [f'  input = "{fmt}"'] * rounds + [f'  expect = "{len(linears)}"']
    return "\n".join(lines) + "\n"
