"""``transform-inputs``: an online block transform at the inputs of linears, its inverse in their weights."""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx

from mxfx.algorithms.block_transform import BlockTransform, apply_blocks, best_order, narrow, wush
from mxfx.algorithms.hadamard import fitting_order, hadamard_matrix, order_words, orders_near, random_signs
from mxfx.calibration.fisher import gradient_moments, warn_of_unreached
from mxfx.calibration.moments import block_moments, moment_bytes
from mxfx.formats import Format
from mxfx.graph.node import Annotation, info, kind, layer_of, op_name, path_of
from mxfx.graph.program import Program
from mxfx.graph.regions import siblings
from mxfx.ops.catalogue import spec
from mxfx.rewrite import ALL, Close, Context, Numerics, Pass, Rewriter, Selector, register
from mxfx.rewrite.basis import change_input, free_name, why_shared
from mxfx.rewrite.facts import (
    ACTIVATIONS_QUANTIZED,
    INPUTS_TRANSFORMED,
    LOWERED,
    QUANTIZERS_FUSED,
    RAISED,
    WEIGHTS_ROUNDED,
    Fact,
    Selected,
)
from mxfx.rewrite.operands import mark_rounded

_NOTE = "input-basis"
#: Rows of a weight that are in float64 at one time: a layer of experts has a million.
_ROWS = 1 << 16


@dataclass(frozen=True)
class Site:
    """One tensor and the linears that read it: all of them share one transform."""

    source: fx.Node
    linears: tuple[fx.Node, ...]

    @property
    def width(self) -> int:
        return self.source.meta["val"].shape[-1]

    @property
    def name(self) -> str:
        """The first linear's path stands for the site."""
        return path_of(self.linears[0])


@register
@dataclass(frozen=True)
class TransformInputs(Pass):
    """Quantize linears in another basis: x T against W T⁻ᵀ, block by block; siblings that read one tensor share T.

    Before::

        %q = linear(%x, @Wq); %k = linear(%x, @Wk)

    After::

        %xt = mxfx.block_transform(%x, @T)
        %q  = linear(%xt, @Wq T⁻ᵀ); %k = linear(%xt, @Wk T⁻ᵀ)

    Both operands of each GEMM are what later passes quantize, so it can run in 4 bits. ``hadamard`` takes T = H (block
    Hadamard, arXiv 2509.23202), ``wush`` the data-aware T in closed form from second moments of activations and of all
    weights that read them (arXiv 2512.00956); blocks whose T is conditioned worse than ``max_condition`` get H.
    ``block`` is the order of T, 0 the whole axis (``hadamard`` only). On an axis that it does not divide ``hadamard``
    takes the largest order that divides both (16 on 80 channels for 32), ``wush`` that of the least expected error
    among those from half to twice of it that divide the axis (16, 20 or 40); which is said. Sites are the linears whose
    input carries a format, or all linears of decoder layers where nothing is annotated yet. ``samples`` limits the
    calibration samples that moments are taken over.

    The weights' second moment Σ wᵀ w minds an error of every output alike. ``against = "gradients"`` takes that of the
    gradient of the loss at the input in its place, which is Σ wᵀ F w with F the Fisher information of the outputs
    (``mxfx.calibration.fisher``): rounding inputs then costs least KL to second order, not least output error. It takes
    a backward pass through the whole model.

    kind: a Hadamard matrix, or the data-aware transform in closed form.
    against: what inputs are balanced against: the weights that read them, or the gradients of the loss (wush only).
    block: order of the transform, or one near it that divides the axis; 0 for the whole axis (hadamard only).
    signs: draw random signs by the run's seed.
    matrix: format of T, rounded before its inverse is taken: T takes fewer bits, and the function stays what it is.
    damping: added to second moments, as a fraction of their mean diagonal.
    max_condition: condition number above which a block gets a Hadamard matrix.
    samples: calibration samples to measure; not given: all.
    """

    name: ClassVar[str] = "transform-inputs"
    requires: ClassVar[frozenset[Fact]] = frozenset({RAISED})
    provides: ClassVar[frozenset[Fact]] = frozenset({INPUTS_TRANSFORMED})
    forbids: ClassVar[frozenset[Fact]] = frozenset({WEIGHTS_ROUNDED, ACTIVATIONS_QUANTIZED, LOWERED, QUANTIZERS_FUSED})
    numerics: ClassVar[Numerics] = Close(1e-9)
    kind: Literal["hadamard", "wush"] = "hadamard"
    against: Literal["weights", "gradients"] = "weights"
    block: int = 32
    signs: bool = False
    matrix: Format | None = None
    damping: float = 1e-4
    max_condition: float = 1e3
    samples: int | None = None
    select: Selector = ALL

    def __post_init__(self) -> None:
        if self.matrix is not None and self.kind == "hadamard":
            raise ValueError("'matrix' is the format of a matrix that data decided: 'hadamard' stores none, or signs")
        if self.against != "weights" and self.kind == "hadamard":
            raise ValueError("'against' is what data-aware transforms balance inputs against: 'hadamard' balances none")

    def foresee(self, rw: Rewriter) -> int | None:
        found = [site for site in sites(rw, self.select) if self._fits(rw, site)]
        return sum(rw.match(site.linears[0], note=self._words(site, *self._orders(site))) for site in found)

    def run(self, rw: Rewriter, ctx: Context) -> None:
        found = [site for site in sites(rw, self.select) if self._fits(rw, site)]
        moments: dict[fx.Node, Tensor] = {}
        gradients: dict[fx.Node, Tensor] = {}
        if self.kind == "wush":
            tokens = ctx.tokens()[: self.samples]
            moments = block_moments(rw.program, self._blocks(found), ctx, tokens, by_head=False)
            if self.against == "gradients":
                gradients = gradient_moments(rw.program, self._blocks(found), ctx, tokens, by_head=False)
                warn_of_unreached(rw, self._blocks(found), gradients, "balanced against weights")
        generator = ctx.generator("transform-inputs")
        for site in found:
            transform = self._transform(rw, site, moments, gradients, generator)
            note = _describe(self._words(site, transform.matrix.shape[-1]), transform)
            if rw.match(site.linears[0], note=f"{note}; {len(site.linears)} linears"):
                insert(rw, site, transform, plain=self.kind == "hadamard" and not self.signs, fmt=self.matrix)
                rw.record.details[site.name] = _account(self.kind, site, transform)

    def moment_bytes(self, rw: Rewriter) -> int:
        """What the second moments of all sites take on the device while they are summed; 0 where none are."""
        found = [site for site in sites(rw, self.select) if self._fits(rw, site)] if self.kind == "wush" else []
        return moment_bytes(self._blocks(found), by_head=False)

    def _blocks(self, found: list[Site]) -> dict[fx.Node, int]:
        """Blocks of moments: those of every order that may be chosen lie within one of their common multiple."""
        return {site.source: lcm(*self._orders(site)) for site in found}

    def _fits(self, rw: Rewriter, site: Site) -> bool:
        reason = None
        if not self._orders(site):
            reason = f"no Hadamard matrix of order {self.block or site.width} fits its {site.width} input channels"
        elif self.kind == "wush" and not self.block:
            reason = "a data-aware transform needs block > 0"
        if reason is not None:
            rw.skip(site.linears[0], reason)
        return reason is None

    def _orders(self, site: Site) -> tuple[int, ...]:
        if self.kind == "wush":
            return orders_near(site.width, self.block)
        order = fitting_order(site.width, self.block)
        return () if order is None else (order,)

    def _words(self, site: Site, *orders: int) -> str:
        return f"{self.kind} {order_words(site.width, self.block, *orders)}"

    def _transform(
        self,
        rw: Rewriter,
        site: Site,
        moments: dict[fx.Node, Tensor],
        gradients: dict[fx.Node, Tensor],
        generator: torch.Generator,
    ) -> BlockTransform:
        orders = self._orders(site)
        if self.kind == "hadamard":
            (block,) = orders
            return orthogonal(self._mixing(block, generator).expand(site.width // block, block, block))
        of_x, other = moments[site.source], gradients.get(site.source)
        if other is None:
            other = weight_moments(rw.program, site, lcm(*orders))
        block = best_order(of_x, other, orders, site.width, self.block, self.damping)
        mixing = self._mixing(block, generator)
        return wush(narrow(of_x, block), narrow(other, block), self.damping, self.max_condition, mixing)

    def _mixing(self, block: int, generator: torch.Generator) -> Tensor:
        matrix = hadamard_matrix(block, torch.float64)
        return random_signs(block, generator, torch.float64)[:, None] * matrix if self.signs else matrix


def sites(rw: Rewriter, select: Selector) -> list[Site]:
    """Every tensor that selected linears read, with those linears; linears that may not change are skipped."""
    annotated = "annotated" in rw.program.facts
    result = []
    for source, linears in siblings(rw.program).items():
        chosen = []
        for linear in linears:
            wanted = "input" in info(linear).formats if annotated else layer_of(linear) is not None
            if not wanted or not select(linear):
                continue
            reason = why_shared(rw, linear)
            if reason is None:
                chosen.append(linear)
            else:
                rw.skip(linear, reason)
        if chosen:
            result.append(Site(source, tuple(chosen)))
    return result


def weight_moments(program: Program, site: Site, block: int) -> Tensor:
    """Mean of ``w_Bᵀ w_B`` over the rows of all linears of the site, float64 ``(width / block, block, block)``."""
    rows, total = 0, torch.zeros(site.width // block, block, block, dtype=torch.float64)
    for linear in site.linears:
        for part in program.weights[program.weight_of(linear)].flatten(0, -2).split(_ROWS):
            columns = part.double().unflatten(-1, (-1, block)).transpose(0, 1)
            total += (columns.mT @ columns).cpu()
            rows += len(part)
    return total / rows


def orthogonal(blocks: Tensor) -> BlockTransform:
    """An orthogonal T as a transform: its inverse is its transpose."""
    count = blocks.shape[0]
    return BlockTransform(
        blocks, blocks.mT, torch.ones(count, dtype=torch.float64), torch.zeros(count, dtype=torch.bool)
    )


def insert(rw: Rewriter, site: Site, transform: BlockTransform, *, plain: bool, fmt: Format | None = None) -> None:
    """Put T, on the grid of ``fmt``, behind the site's tensor and T⁻ᵀ into its linears; ``plain`` Hadamards need no
    stored matrix.
    """
    if not plain:
        transform = transform.stored_as(rw.program.dtype, fmt)
    inverse = transform.inverse.mT
    for linear in site.linears:
        change_input(rw, linear, lambda w: apply_blocks(w, inverse))
    first = site.linears[0]
    if plain:
        new = rw.call(torch.ops.mxfx.hadamard.default, site.source, transform.matrix.shape[-1], like=first)
    else:
        matrix = rw.add_weight(free_name(rw, f"transforms.{site.name}.input"), transform.matrix, first)
        new = rw.call(torch.ops.mxfx.block_transform.default, site.source, matrix, like=first)
        if fmt is not None:
            rw.set_info(new, info(new).with_format("matrix", Annotation(fmt, rw.pass_name)))
            mark_rounded(rw, new, "matrix")
    for linear in site.linears:
        spec(linear).set(rw, "input", new)
        rw.set_info(linear, info(linear).with_note(_NOTE, new.name))


def _describe(words: str, transform: BlockTransform) -> str:
    fallen = int(transform.fell_back.sum())
    return words + (f", {fallen} of {len(transform.fell_back)} blocks fell back to Hadamard" if fallen else "")


def _account(kind: str, site: Site, transform: BlockTransform) -> dict[str, object]:
    return {
        "transform": kind,
        "block": transform.matrix.shape[-1],
        "linears": [path_of(n) for n in site.linears],
        "worst_condition": float(transform.condition.max()),
        "fallen_back_blocks": int(transform.fell_back.sum()),
    }


@INPUTS_TRANSFORMED.means
def inputs_transformed(program: Program, selected: Selected) -> str | None:
    for linear in program.products():
        basis, source = info(linear).notes.get(_NOTE), spec(linear).get("input")
        if basis is not None and not _reaches(source, str(basis)):
            return f"{path_of(linear)} has its weight in the basis of {basis} and reads {source}"
    return None


def _reaches(node: object, name: str) -> bool:
    while isinstance(node, fx.Node):
        if node.name == name:
            return True
        if kind(node) not in ("fake_quantize", "block_transform", "hadamard") and op_name(node) != "mxfx.cast.default":
            return False
        node = spec(node).get("input")
    return False
