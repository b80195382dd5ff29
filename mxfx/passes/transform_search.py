"""``transform-search``: the best transform for each input, by held-out output error."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import lcm
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, fx

from mxfx.algorithms.block_transform import BlockTransform, best_order, narrow, smoothing_scales, wush
from mxfx.algorithms.hadamard import fitting_order, hadamard_matrix, orders_near
from mxfx.calibration.decisions import load_decisions, store_decisions
from mxfx.calibration.keys import Keys, digest, environment, token_key
from mxfx.calibration.moments import block_moments, samples
from mxfx.calibration.training import divergence
from mxfx.formats import Format
from mxfx.graph.module import build
from mxfx.graph.node import info, path_of
from mxfx.graph.program import Program
from mxfx.ground import ranks
from mxfx.passes.insert_fake_quant import InsertFakeQuant
from mxfx.passes.quantize_kv_cache import QuantizeKvCache
from mxfx.passes.round_weights import RoundWeights
from mxfx.passes.transform_inputs import Site, insert, orthogonal, sites, weight_moments
from mxfx.rewrite import ALL, Close, Context, Numerics, Pass, Rewriter, Selector, register
from mxfx.rewrite.facts import (
    ACTIVATIONS_QUANTIZED,
    ANNOTATED,
    INPUTS_TRANSFORMED,
    LOWERED,
    QUANTIZERS_FUSED,
    RAISED,
    WEIGHTS_ROUNDED,
    Fact,
)
from mxfx.rewrite.lowering import lowered_copy

_NONE = "none"
#: Held-out tokens of the closing check.
_CHECK_TOKENS = 4096


@register
@dataclass(frozen=True)
class TransformSearch(Pass):
    """Choose a transform per input, by the output error of its linears when both operands are quantized, and insert it.

    Before::

        %q = linear(%x, @Wq) {weight: mxint4@32, input: mxint4@32}; %k = linear(%x, @Wk) {…}

    After::

        %xt = mxfx.block_transform(%x, @T); %q = linear(%xt, @Wq T⁻ᵀ); %k = linear(%xt, @Wk T⁻ᵀ)

    ``candidates``: ``none``; ``hadamard-B`` (blocks of B, or ``full``); ``wush-B`` (data-aware, arXiv 2512.00956);
    ``scaled-B`` (channels smoothed, arXiv 2211.10438, then Hadamard blocks of B). Data-aware ones are fitted on most
    of the calibration samples; all are scored on about ``rows`` tokens of the others:
    Σ‖ŷ − y‖² / Σ‖y‖² of about ``outputs`` output channels of the linears that share the input, rounded to nearest. One
    run through the model for statistics and one for the held-out rows, no perplexity passes; cost grows with the number
    of layers. Errors of single layers need not add up: at the end the whole model, quantized, is compared with the
    float one on held-out tokens (mean KL), once with each input's own choice and once with the one candidate that
    is best on average; the better of the two is kept. Decisions are readable JSON in the record, kept in ``cache_path``
    (or the run's cache) under a key of program, tokens and options.

    candidates: what is tried at each input: see above; an axis that B does not divide gets the largest order that
        divides both, or with wush the best of those near B.
    rows: held-out tokens that score a candidate.
    outputs: output channels, about, that score a candidate.
    held_out: share of the calibration samples that scores, between 0 and 1.
    damping: added to second moments, as a fraction of their mean diagonal.
    max_condition: condition number above which a block gets a Hadamard matrix.
    cache_path: file that keeps the decisions; not given: the run's cache.
    """

    name: ClassVar[str] = "transform-search"
    requires: ClassVar[frozenset[Fact]] = frozenset({RAISED, ANNOTATED})
    provides: ClassVar[frozenset[Fact]] = frozenset({INPUTS_TRANSFORMED})
    forbids: ClassVar[frozenset[Fact]] = frozenset({WEIGHTS_ROUNDED, ACTIVATIONS_QUANTIZED, LOWERED, QUANTIZERS_FUSED})
    numerics: ClassVar[Numerics] = Close(1e-9)
    candidates: tuple[str, ...] = (
        _NONE, "hadamard-32", "hadamard-64", "hadamard-128", "hadamard-full", "wush-32", "wush-64", "scaled-32",
    )  # fmt: skip
    rows: int = 256
    outputs: int = 384
    held_out: float = 0.25
    damping: float = 1e-4
    max_condition: float = 1e3
    cache_path: Path | None = None
    select: Selector = ALL

    def __post_init__(self) -> None:
        if not self.candidates:
            raise ValueError("transform-search: 'candidates' is empty, expected one or more")
        for candidate in self.candidates:
            _parse(candidate)
        if not 0.0 < self.held_out < 1.0:
            raise ValueError(f"transform-search: held_out must lie between 0 and 1, got {self.held_out}")

    def foresee(self, rw: Rewriter) -> int | None:
        found = self._sites(rw)
        return sum(rw.match(site.linears[0], note=self._choice(site.width)) for site in found)

    def run(self, rw: Rewriter, ctx: Context) -> None:
        found = self._sites(rw)
        if not found:
            return
        fit, test = self._split(ctx.tokens())
        moments = self._moments(rw.program, found, ctx, fit)
        key = self._key(rw.program, found, ctx)
        file = self.cache_path or (ctx.cache / f"transform-search-{key}.json" if ctx.cache is not None else None)
        decisions, unusable = load_decisions(file, key)
        if unusable is not None:
            rw.warn(unusable)
        if decisions is None:
            decisions = self._decide(rw.program, found, moments, ctx, test)
            store_decisions(file, key, decisions)
        rw.record.details.update({name: decisions[name] for name in ("sites", "check")})
        chosen = {name: decision["chosen"] for name, decision in decisions["sites"].items()}
        self._insert_all(rw, found, chosen, moments)

    def _choice(self, width: int) -> str:
        fit = [_fitted(c, width, *_orders(c, width)) for c in self.candidates if _misfit(c, width) is None]
        return f"{width} channels: one of {' '.join(fit)}"

    def _sites(self, rw: Rewriter) -> list[Site]:
        """Where at least one candidate fits; the others are skipped."""
        found = []
        for site in sites(rw, self.select):
            misfits = [_misfit(candidate, site.width) for candidate in self.candidates]
            if all(misfits):
                rw.skip(site.linears[0], f"no candidate fits: {misfits[0]}")
            else:
                found.append(site)
        return found

    def _split(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Samples to fit on and samples to score on; a single sample is cut in two."""
        if tokens.shape[0] == 1:
            cut = max(2, round(tokens.shape[1] * (1 - self.held_out)))
            return tokens[:, :cut], tokens[:, cut:]
        cut = min(tokens.shape[0] - 1, max(1, round(tokens.shape[0] * (1 - self.held_out))))
        return tokens[:cut], tokens[cut:]

    def _moments(self, program: Program, found: list[Site], ctx: Context, tokens: Tensor) -> dict[fx.Node, Tensor]:
        """Second moments in the widest block that any candidate asks for; smaller blocks are their diagonals."""
        wanted = [c for c in self.candidates if _parse(c)[0] in ("wush", "scaled")]
        widest = {s.source: lcm(*(order for c in wanted for order in _orders(c, s.width))) for s in found}
        return block_moments(program, widest, ctx, tokens, by_head=False)

    def _decide(
        self, program: Program, found: list[Site], moments: dict[fx.Node, Tensor], ctx: Context, tokens: Tensor
    ) -> dict[str, object]:
        held = replace(ctx, tokens=lambda: tokens)
        keep: dict[fx.Node, Callable[[Tensor], Tensor]] = {s.source: lambda x: x for s in found}
        seen = samples(program, keep, held, self.rows, "transform-search")
        decisions: dict[str, dict] = {}
        mine = found[ranks.share(len(found))]
        with ranks.alone():
            for site in ctx.progress(mine, "transform search", len(mine)):
                x = seen[site.source].float().to(ctx.device)
                decisions[site.name] = self._decision(program, site, x, moments[site.source])
        decisions = ranks.merged(decisions)
        for name, decision in decisions.items():
            if not all(map(math.isfinite, decision["errors"].values())):
                raise ValueError(f"transform-search: {name}: its input is not finite: errors are {decision['errors']}")
        check = self._check(program, found, decisions, moments, held)
        for site in found:
            decision = decisions[site.name]
            decision["multiplications_per_token"] = site.width * decision["blocks"][decision["chosen"]]
        return {"sites": decisions, "check": check}

    def _decision(self, program: Program, site: Site, x: Tensor, moments: Tensor) -> dict[str, object]:
        errors, skipped, blocks = {}, {}, {}
        for candidate in self.candidates:
            made = self._make(candidate, program, site, moments)
            if isinstance(made, str):
                skipped[candidate] = made
            else:
                errors[candidate] = _error(program, site, x, self.outputs, made)
                blocks[candidate] = 0 if made is None else made.matrix.shape[-1]
        return {
            "chosen": min(errors, key=errors.__getitem__),
            "errors": errors,
            "skipped": skipped,
            "linears": [path_of(n) for n in site.linears],
            "blocks": blocks,
        }

    def _check(
        self,
        program: Program,
        found: list[Site],
        decisions: dict[str, dict],
        moments: dict[fx.Node, Tensor],
        ctx: Context,
    ) -> dict[str, object]:
        """Whether choices by site beat one for all, on the whole model; if not, ``decisions`` take that one."""
        by_site = {name: decision["chosen"] for name, decision in decisions.items()}
        everywhere = [c for c in self.candidates if all(c in decision["errors"] for decision in decisions.values())]
        if not everywhere or len(set(by_site.values())) == 1:
            return {"kept": "by site", "kl": {}}
        mean = {c: sum(decision["errors"][c] for decision in decisions.values()) for c in everywhere}
        best = min(mean, key=mean.__getitem__)
        choices = {"by site": by_site, f"{best} everywhere": dict.fromkeys(by_site, best)}
        ids = ctx.tokens()
        ids = ids[: max(1, _CHECK_TOKENS // ids.shape[1])]
        mine = list(choices)[ranks.share(len(choices))]
        expected = _logits(program, ids, ctx)
        kl = {}
        with ranks.alone():
            for name in mine:
                rw = Rewriter(program.copy(), self.name)
                # Nodes of a copy have the names of the originals.
                named = {node.name: node for node in rw.graph.nodes}
                copies = [Site(named[s.source.name], tuple(named[n.name] for n in s.linears)) for s in found]
                of_copies = {named[source.name]: moment for source, moment in moments.items()}
                self._insert_all(rw, copies, choices[name], of_copies)
                for pass_ in (RoundWeights(), InsertFakeQuant(), QuantizeKvCache()):
                    pass_.run(rw, ctx)
                kl[name] = float(divergence(_logits(rw.program, ids, ctx), expected))
        kl = ranks.merged(kl)
        kept = min(kl, key=kl.__getitem__)
        for name, decision in decisions.items():
            decision["chosen"] = choices[kept][name]
        return {"kept": kept, "kl": kl, "tokens": ids.numel()}

    def _make(self, candidate: str, program: Program, site: Site, moments: Tensor) -> BlockTransform | str | None:
        """The transform of a candidate at a site, None for no transform, or why there is none."""
        kind, wanted = _parse(candidate)
        if kind == _NONE:
            return None
        orders = _orders(candidate, site.width)
        if not orders:
            return _misfit(candidate, site.width)
        if kind == "wush":
            wide = lcm(*orders)
            of_x, of_w = narrow(moments, wide), weight_moments(program, site, wide)
            block = best_order(of_x, of_w, orders, site.width, wanted, self.damping)
            return wush(narrow(of_x, block), narrow(of_w, block), self.damping, self.max_condition)
        (block,) = orders
        hadamard = hadamard_matrix(block, torch.float64)
        blocks = hadamard.expand(site.width // block, block, block)
        if kind == "hadamard":
            return orthogonal(blocks)
        energy = moments.diagonal(dim1=-2, dim2=-1).flatten()
        of_weight = weight_moments(program, site, block).diagonal(dim1=-2, dim2=-1).flatten()
        scale = smoothing_scales(energy.sqrt(), of_weight.sqrt()).reshape(-1, block)
        plain = orthogonal(blocks)
        return BlockTransform(
            blocks / scale[:, :, None], blocks.mT * scale[:, None, :], plain.condition, plain.fell_back
        )

    def _insert_all(
        self, rw: Rewriter, found: list[Site], chosen: dict[str, str], moments: dict[fx.Node, Tensor]
    ) -> None:
        for site in found:
            candidate = chosen[site.name]
            made = self._make(candidate, rw.program, site, moments[site.source])
            if made is None:
                rw.skip(site.linears[0], "no transform is best here", done=True)
            elif isinstance(made, str):
                raise ValueError(f"transform-search: {site.name}: {candidate} was decided, but {made}")
            elif rw.match(
                site.linears[0],
                note=f"{_fitted(candidate, site.width, made.matrix.shape[-1])}; {len(site.linears)} linears",
            ):
                insert(rw, site, made, plain=candidate.startswith("hadamard"))

    def _key(self, program: Program, found: list[Site], ctx: Context) -> str:
        data = {
            "tokens": token_key(ctx.tokens()),
            "options": {k: str(v) for k, v in vars(self).items() if k != "cache_path"},
            "formats": digest([[str(a.format) for a in info(n).formats.values()] for s in found for n in s.linears]),
            "dtype": str(program.dtype),
            "environment": environment(ctx.device),
        }
        return Keys().key((n for s in found for n in s.linears), program.weights.hash, data)


def _parse(candidate: str) -> tuple[str, int]:
    """Kind and block of a candidate; block 0 is the whole axis. Raises ``ValueError`` for another spelling."""
    kind, _, size = candidate.partition("-")
    if candidate == _NONE:
        return _NONE, 0
    if kind == "hadamard" and size == "full":
        return kind, 0
    if kind in ("hadamard", "wush", "scaled") and size.isdigit() and int(size) > 1:
        return kind, int(size)
    raise ValueError(
        f"transform-search: unknown candidate {candidate!r}; "
        "expected none, hadamard-full, hadamard-B, wush-B or scaled-B"
    )


def _misfit(candidate: str, width: int) -> str | None:
    """Why a candidate cannot transform an axis of ``width`` channels; None if it can."""
    kind, block = _parse(candidate)
    if kind == _NONE or _orders(candidate, width):
        return None
    return f"no Hadamard matrix of order {block or width} fits {width} channels"


def _orders(candidate: str, width: int) -> tuple[int, ...]:
    """The orders that a candidate may take on an axis of ``width`` channels; data choose where there are several."""
    kind, wanted = _parse(candidate)
    if kind == "wush":
        return orders_near(width, wanted)
    order = None if kind == _NONE else fitting_order(width, wanted)
    return () if order is None else (order,)


def _fitted(candidate: str, width: int, *orders: int) -> str:
    """A candidate with the orders that it has on an axis of ``width`` channels, where they are others."""
    _, wanted = _parse(candidate)
    return candidate if orders in ((), (wanted or width,)) else f"{candidate} as {' or '.join(map(str, orders))}"


def _logits(program: Program, ids: Tensor, ctx: Context) -> Tensor:
    module = build(lowered_copy(program, ctx.device)).to(ctx.device)
    with torch.no_grad():
        return torch.cat([module(one.to(ctx.device)) for one in ids.split(1)])


def _error(program: Program, site: Site, x: Tensor, outputs: int, transform: BlockTransform | None) -> float:
    """Relative squared error, summed over rows, of about ``outputs`` channels, evenly spaced over all linears."""
    x = x.flatten(0, -2)
    moved = x if transform is None else transform.activations(x)
    # The channels of all experts of a stack: whichever a token reads, it is turned alike.
    weights = [program.weights[program.weight_of(linear)].flatten(0, -2) for linear in site.linears]
    stride = max(1, sum(len(w) for w in weights) // outputs)
    wrong, right = torch.zeros(len(x), device=x.device), torch.zeros(len(x), device=x.device)
    inputs = {fmt: _rounded(moved, fmt) for fmt in {_format(linear, "input") for linear in site.linears}}
    for linear, whole in zip(site.linears, weights, strict=True):
        weight = whole[::stride].float().to(x.device)
        target = x @ weight.mT
        turned = weight if transform is None else transform.weight(weight)
        got = inputs[_format(linear, "input")] @ _rounded(turned, _format(linear, "weight")).mT
        wrong += (got - target).square().sum(-1)
        right += target.square().sum(-1)
    return float(wrong.sum() / right.sum().clamp_min(1e-30))


def _format(linear: fx.Node, operand: str) -> Format | None:
    annotation = info(linear).formats.get(operand)
    return None if annotation is None else annotation.format


def _rounded(x: Tensor, fmt: Format | None) -> Tensor:
    return x if fmt is None else fmt.fake_quantize(x)
