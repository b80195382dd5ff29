"""``rotation-search``: which kinds of matmul gain from an online rotation, found greedily by perplexity."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, fx

import mxfx.ops.kernels  # noqa: F401  (registers the kernels that quantize)
from mxfx.algorithms.hadamard import fitting_order, kronecker_signs, kronecker_transform
from mxfx.calibration.decisions import load_decisions, store_decisions
from mxfx.calibration.keys import Keys, digest, environment, token_key
from mxfx.graph.module import build
from mxfx.graph.node import info, path_of
from mxfx.graph.program import Program
from mxfx.ground import ranks
from mxfx.ops.catalogue import spec
from mxfx.passes.online_rotation import fitting, rotate_operands, rotated_operands
from mxfx.rewrite import Close, Context, Numerics, Pass, Rewriter, register
from mxfx.rewrite.facts import ACTIVATIONS_QUANTIZED, ANNOTATED, KV_QUANTIZED, LOWERED, ROTATED_ONLINE, Fact
from mxfx.rewrite.lowering import lowered_copy

#: Sites of attention; all others are the last names of linears' paths.
_ATTENTION = ("qk_matmul", "kv_cache")
#: What a data set of the search's own gives where nothing is said, as Mase's.
_SAMPLES, _LENGTH = 32, 1024
_ALL_SITES = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj", *_ATTENTION)


@register
@dataclass(frozen=True)
class RotationSearch(Pass):
    """Find greedily which types of matmul to rotate online (as ``online-rotation`` does), and rotate those.

    Before::

        annotated linears and attention, weights rounded or not

    After::

        the operands of the winning types rotated and rotated back; record.details holds every step of the search

    Greedy forward over ``sites`` (the last name of a linear's path, ``kv_cache`` for keys and values, ``qk_matmul`` for
    queries), all layers at once: each round tries every remaining type on the calibration tokens with activations and
    caches quantized, keeps the one with the lowest perplexity, and stops when that gains no more than
    ``improvement_eps``. ``samples`` and ``length`` limit the tokens; with ``dataset`` they are those of another data
    set than the run's. Of a thousand tokens the perplexity of a model that rounding has all but broken moves by a tenth
    with the last bits of a sum: there ``patience`` looks further. Winners are kept in ``cache_path`` under a key of
    program, tokens and options: later runs skip the search; a file of another run is replaced with a warning.

    sites: types to search: last names of linears' paths, or kv_cache.
    improvement_eps: fall of the perplexity that a round must exceed.
    patience: rounds in a row without such a fall that are gone through before the search stops; types after the last
        fall are not rotated.
    cache_path: file that keeps the winners; not given: the run's cache.
    dataset: data set to score on; not given: the run's calibration tokens.
    samples: calibration samples to take; not given: all, or 32 of ``dataset``.
    length: tokens to take of each sample; not given: all, or 1024 of ``dataset``.
    block: order of the Hadamard matrices, or the largest that divides it and the axis; 0 for the whole axis.
    """

    name: ClassVar[str] = "rotation-search"
    requires: ClassVar[frozenset[Fact]] = frozenset({ANNOTATED})
    provides: ClassVar[frozenset[Fact]] = frozenset({ROTATED_ONLINE})
    forbids: ClassVar[frozenset[Fact]] = frozenset({ACTIVATIONS_QUANTIZED, KV_QUANTIZED, LOWERED})
    numerics: ClassVar[Numerics] = Close(1e-9)
    sites: tuple[str, ...] = _ALL_SITES
    improvement_eps: float = 0.0
    patience: int = 0
    cache_path: Path | None = None
    dataset: str | None = None
    samples: int | None = None
    length: int | None = None
    block: int = 0

    def __post_init__(self) -> None:
        if self.patience < 0:
            raise ValueError(f"'patience' is {self.patience}, must be at least 0")

    def foresee(self, rw: Rewriter) -> int | None:
        members = {site: _members(rw.program, site) for site in self.sites}
        return sum(
            len(list(fitting(rw, node, self.block, _place(site)))) for site, nodes in members.items() for node in nodes
        )

    def run(self, rw: Rewriter, ctx: Context) -> None:
        members = {site: nodes for site in self.sites if (nodes := _members(rw.program, site))}
        for site in self.sites:
            if site not in members and self.sites != _ALL_SITES:
                rw.warn(f"no {site} carries a format: it is not searched")
        tokens = self._tokens(ctx)
        key = self._key(rw.program, ctx, tokens)
        file = self._file(ctx, key)
        found, unusable = load_decisions(file, key)
        if unusable is not None:
            rw.warn(unusable)
        if found is not None:
            rw.record.details["from_file"] = str(file)
        else:
            found = self._search(rw.program, members, ctx, tokens)
            store_decisions(file, key, found)
        rw.record.details.update(found)
        for site, nodes in members.items():
            for node in nodes:
                if site in found["winners"]:
                    rotate_operands(rw, node, self.block, _place(site))
                else:
                    rw.skip(node, f"{site}: rotating it lowered the perplexity too little", done=True)

    def _tokens(self, ctx: Context) -> Tensor:
        if self.dataset is None:
            return ctx.tokens()[: self.samples, : self.length]
        return ctx.read(self.dataset, *self.asked)

    @property
    def asked(self) -> tuple[int, int]:
        """Samples, and tokens of each, to read of a ``dataset``."""
        return self.samples or _SAMPLES, self.length or _LENGTH

    def _search(
        self, program: Program, members: dict[str, list[fx.Node]], ctx: Context, tokens: Tensor
    ) -> dict[str, object]:
        score = _scorer(program, members, self.block, ctx, tokens)
        best = baseline = ranks.collected(score([]))[0]
        if not math.isfinite(baseline):
            raise ValueError(
                f"rotation-search: the perplexity of the quantized model on the calibration tokens is {baseline}: "
                "its logits are not finite, so no type can be told from another"
            )
        path: list[str] = []
        kept, last = 0, baseline
        rounds: list[dict[str, float]] = []
        while len(path) < len(members) and len(path) - kept <= self.patience:
            remaining = [site for site in members if site not in path]
            done = f"rotation search: {', '.join(path) or 'nothing'} rotated, perplexity {last:.4f}"
            mine = remaining[ranks.share(len(remaining))]
            with ranks.alone():
                scored = {site: score([*path, site]) for site in ctx.progress(mine, done, len(mine))}
            tried = ranks.merged(scored)
            rounds.append(tried)
            path.append(min(tried, key=tried.__getitem__))
            last = tried[path[-1]]
            if best - last > self.improvement_eps:
                kept, best = len(path), last
        taken = [*path[:kept], *[None] * (len(path) - kept)]
        steps = [{"perplexity": tried, "winner": winner} for tried, winner in zip(rounds, taken, strict=True)]
        return {
            "winners": path[:kept],
            "baseline": baseline,
            "perplexity": best,
            "tokens": tokens.numel(),
            "nodes": {site: len(nodes) for site, nodes in members.items()},
            "steps": steps,
        }

    def _key(self, program: Program, ctx: Context, tokens: Tensor) -> str:
        output = next(n for n in program.graph.nodes if n.op == "output")
        formats = {
            n.name: {o: str(a.format) for o, a in info(n).formats.items()}
            for n in program.graph.nodes
            if info(n).formats
        }
        data = {
            "tokens": token_key(tokens),
            "sites": list(self.sites),
            "eps": self.improvement_eps,
            "patience": self.patience,
            "block": self.block,
            "dtype": str(program.dtype),
            "formats": digest(formats),
            "environment": environment(ctx.device),
        }
        return Keys().key([output], program.weights.hash, data)

    def _file(self, ctx: Context, key: str) -> Path | None:
        if self.cache_path is not None:
            return Path(self.cache_path)
        return None if ctx.cache is None else ctx.cache / f"rotation-search-{key}.json"


def _members(program: Program, site: str) -> list[fx.Node]:
    """Nodes of a type that carry a format where it would rotate."""
    if site in _ATTENTION:
        candidates = list(program.nodes("attention"))
    else:
        candidates = [n for n in program.products() if path_of(n).rsplit(".", 1)[-1] == site]
    return [n for n in candidates if rotated_operands(n, _place(site))]


def _place(site: str) -> str:
    """The site of ``online-rotation`` that a type of matmul is."""
    return site if site in _ATTENTION else "linear"


def quantized_ways(x: Tensor, format: str, on: list[Tensor], *factors: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """``x`` rounded onto ``format`` as it is, and in the basis of a Hadamard matrix and back; None if nobody reads it.

    ``on`` has a 0-dim bool for each reader: whether it reads the second. The matrix acts on blocks of the last axis;
    its ±1 ``factors`` are those of ``kronecker_signs``.
    """
    plain, turned = not all(map(bool, on)), any(map(bool, on))
    return _rounded(x, format) if plain else None, _turned(x, format, *factors) if turned else None


def way(ways: tuple[Tensor | None, Tensor | None], on: Tensor) -> Tensor:
    """What one reader of ``quantized_ways`` reads."""
    found = ways[bool(on)]
    assert found is not None
    return found


def _turned(x: Tensor, format: str, left: Tensor, right: Tensor) -> Tensor:
    rounded = _rounded(kronecker_transform(x, left, right), format)
    return kronecker_transform(rounded, left.mT, right.mT)


def _rounded(x: Tensor, format: str) -> Tensor:
    """By the kernel of the device, where the definition would take most of a trial's time."""
    return torch.ops.mxfx_kernels.fake_quantize(x, format, -1)


def _scorer(
    program: Program, members: dict[str, list[fx.Node]], block: int, ctx: Context, tokens: Tensor
) -> Callable[[Iterable[str]], float]:
    """Perplexity of the tokens as a function of the types that are rotated."""
    site_of = {
        (node.name, operand): site
        for site, nodes in members.items()
        for node in nodes
        for operand in rotated_operands(node, _place(site))
    }
    rw = Rewriter(program.copy(), "rotation-search")
    for site in members:
        rw.weights.add(_switch(site), torch.zeros((), dtype=torch.bool), rw.pass_name)
    read: dict[tuple[fx.Node, str], list[tuple[fx.Node, str, str | None]]] = {}
    for node in rw.program.nodes():
        for operand in rotated_operands(node):
            source, fmt = spec(node).node_of(operand), str(info(node).formats[operand].format)
            assert source is not None
            read.setdefault((source, fmt), []).append((node, operand, site_of.get((node.name, operand))))
    for (source, fmt), readers in read.items():
        _insert_switches(rw, source, fmt, readers, block)
    module = build(lowered_copy(rw.program, ctx.device)).to(ctx.device)
    switches = {site: module.get_buffer(_switch(site)) for site in members}
    batches = tokens.to(ctx.device).split(max(1, 4096 // tokens.shape[1]))

    def score(rotated: Iterable[str]) -> float:
        on = set(rotated)
        for site, switch in switches.items():
            switch.fill_(site in on)
        return _perplexity(module, batches)

    return score


def _switch(site: str) -> str:
    return f"switches.{site}"


def _insert_switches(
    rw: Rewriter, source: fx.Node, fmt: str, readers: list[tuple[fx.Node, str, str | None]], block: int
) -> None:
    """One quantizer for all who read a tensor, each with the switch of its type; who has no type reads it quantized."""
    first = readers[0][0]
    val = source.meta["val"]
    order = fitting_order(val.shape[-1], block)
    switched = [reader for reader in readers if reader[2] is not None and order is not None]
    if len(switched) < len(readers):
        plain = rw.call(torch.ops.mxfx.fake_quantize.default, source, fmt, -1, like=first)
        for node, operand, site in readers:
            if site is None or order is None:
                spec(node).set(rw, operand, plain)
    if order is None or not switched:
        return
    factors = _factors(rw, order, first)
    on = {site: rw.weight(_switch(site), first) for _, _, site in switched if site is not None}
    ways = rw.call(quantized_ways, source, fmt, list(on.values()), *factors, like=first, val=(val, val))
    for node, operand, site in switched:
        assert site is not None
        spec(node).set(rw, operand, rw.call(way, ways, on[site], like=first, val=val))


def _factors(rw: Rewriter, order: int, like: fx.Node) -> list[fx.Node]:
    names = [f"hadamard_signs.{order}.{side}" for side in ("left", "right")]
    if names[0] not in rw.weights:
        for name, signs in zip(names, kronecker_signs(order, torch.float64), strict=True):
            rw.weights.add(name, signs, rw.pass_name, constant=True)
    return [rw.weight(name, like) for name in names]


def _perplexity(module: fx.GraphModule, batches: tuple[Tensor, ...]) -> float:
    """exp of the mean next-token cross-entropy, in float32; infinite where a logit is NaN, which loses to any other."""
    total, count = 0.0, 0
    with torch.no_grad():
        for ids in batches:
            logits = module(ids)[:, :-1].float()
            total += float(
                torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
            )
            count += ids[:, 1:].numel()
    return math.inf if math.isnan(total) else float(torch.tensor(total / count, dtype=torch.float64).exp())
