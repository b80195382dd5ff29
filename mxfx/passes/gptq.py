"""``gptq``: calibrated rounding of weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx

from mxfx.algorithms.gptq import GptqResult, asymmetric_target, gptq_batch
from mxfx.algorithms.gptq_experts import ExpertResult, gptq_experts
from mxfx.calibration.accounts import expert_account, fallback, linear_account
from mxfx.calibration.checkpoints import LayerCheckpoints, open_checkpoints
from mxfx.calibration.fisher import token_importance
from mxfx.calibration.keys import Keys, digest, environment, token_key
from mxfx.calibration.sources import first_of
from mxfx.calibration.stream import (
    ExpertGroup,
    Group,
    LayerRun,
    StreamOptions,
    stream_layers,
    without_quantizers,
)
from mxfx.graph.node import info, layer_of, path_of
from mxfx.graph.program import Program
from mxfx.ground import ranks
from mxfx.ops.catalogue import spec, weights_of
from mxfx.passes.insert_fake_quant import InsertFakeQuant
from mxfx.passes.quantize_kv_cache import QuantizeKvCache
from mxfx.rewrite import ALL, Context, ExpectationError, Lossy, Numerics, Pass, Rewriter, Selector, register
from mxfx.rewrite.context import StrictError
from mxfx.rewrite.facts import (
    ANNOTATED,
    CALIBRATED,
    LOWERED,
    QUANTIZERS_FUSED,
    ROUNDED_TO_NEAREST,
    WEIGHTS_ROUNDED,
    Fact,
)
from mxfx.rewrite.operands import is_rounded, mark_rounded, readers_of
from mxfx.rewrite.phases import any_weight, take_over

#: λ of the asymmetric target, relative to the mean diagonal of the Hessian.
_RIDGE = 0.1
#: The options that decide how a weight is solved.
_SOLVER = ("damp", "order", "exponents", "refine", "asymmetric", "min_expert_tokens", "guided")


@register
@dataclass(frozen=True)
class Gptq(Pass):
    """Round the weights of annotated linears so that their outputs on calibration data change least.

    Before::

        %y = linear(%x, @w)     {weight: mxint4@32}

    After::

        %y = linear(%x, @w')    {weight: mxint4@32}     # w' on the grid, min ‖x wᵀ - x w'ᵀ‖²

    GPTQ (arXiv 2210.17323) with the shared exponent of each block searched while its columns are compensated. Layer
    by layer; each linear's input is measured after everything upstream of it was rewritten. Linears that read one
    node share its Hessian and the factorization.

    Weights that ``gptq`` or ``distill`` put on their grids are not taken again: without a ``select`` each is refused.

    Of two phases one is calibrated in, with its formats; the other takes its weights where the formats of these agree.

    A linear whose Hessian cannot be factorized or is 0 is rounded to nearest with a warning, counted in ``fallbacks``.
    Experts have a Hessian each, of the tokens that they got. One that got fewer than ``min_expert_tokens`` takes that
    of all tokens of its layer, or is rounded to nearest where those are too few: with a warning, and in the table
    ``experts`` of the record.

    damp: added to the diagonal of the Hessian, as a fraction of its mean.
    order: how columns are visited: blocks by falling energy, or as they stand.
    exponents: shared exponents searched while columns are compensated, or by the format's own rule.
    refine: sweeps of block-wise re-optimisation behind each solution.
    asymmetric: part of the way to the least-squares weight for quantized inputs, from 0 to 1 (0.25 helps at W4A4).
    guided: tokens count by how much the loss minds the outputs at them, but for experts, by a pass back through the
        whole model (GuidedQuant, arXiv 2505.07004, one group of channels).
    min_expert_tokens: tokens below which an expert counts as starving.
    quantized_inputs: true also rounds annotated activations, keys and values while measuring, false leaves quantizers
        out; not given: the graph as it stands.
    samples: calibration samples to take; not given: all.
    length: tokens to take of each sample; not given: all.
    batch_size: samples that run together.
    max_layers: decoder layers to take; not given: all.
    activations: where activations wait between layers: device, cpu or disk; not given: where they fit by the estimate
        that ``mxfx check`` prints.
    precision: of the calibration run: auto is float32 on a CPU, the model's own elsewhere.
    checkpoint_dir: folder that keeps each solved layer; not given: the run's cache.
    phase: of a pipeline with phases, the one that is calibrated in; not given: decode.
    """

    name: ClassVar[str] = "gptq"
    requires: ClassVar[frozenset[Fact]] = frozenset({ANNOTATED})
    provides: ClassVar[frozenset[Fact]] = frozenset({WEIGHTS_ROUNDED, CALIBRATED})
    forbids: ClassVar[frozenset[Fact]] = frozenset({CALIBRATED, LOWERED, ROUNDED_TO_NEAREST, QUANTIZERS_FUSED})
    numerics: ClassVar[Numerics] = Lossy()
    by_phase: ClassVar[bool] = True
    select: Selector = ALL
    damp: float = 0.01
    order: Literal["block", "none"] = "block"
    exponents: Literal["sweep", "rule"] = "sweep"
    refine: int = 0
    asymmetric: float = 0.0
    guided: bool = False
    min_expert_tokens: int = 128
    quantized_inputs: bool | None = None
    samples: int | None = None
    length: int | None = None
    batch_size: int = 8
    max_layers: int | None = None
    activations: Literal["device", "cpu", "disk"] | None = None
    precision: Literal["auto", "model", "float32"] = "auto"
    checkpoint_dir: Path | None = None
    phase: Literal["prefill", "decode"] | None = None

    def __post_init__(self) -> None:
        _require(0 <= self.damp < float("inf"), "damp", self.damp, "a number from 0 on")
        _require(self.refine >= 0, "refine", self.refine, "0 or more")
        _require(0 <= self.asymmetric <= 1, "asymmetric", self.asymmetric, "between 0 and 1")
        for name in ("samples", "length", "batch_size", "max_layers", "min_expert_tokens"):
            number = getattr(self, name)
            _require(number is None or number >= 1, name, number, "1 or more")

    def provided(self) -> frozenset[Fact]:
        """A part of the weights leaves something to calibrate."""
        return self.provides if self.select == ALL and self.max_layers is None else self.provides - {CALIBRATED}

    def foresee(self, rw: Rewriter) -> int | None:
        return len(self._targets(rw, final=False))

    def run(self, rw: Rewriter, ctx: Context) -> None:
        rw.record.details |= {"fallbacks": 0, "resumed_layers": 0, "linears": [], "experts": []}
        targets = take_over(rw, ctx.peer, self._targets(rw, peer=ctx.peer))
        if not targets:
            return
        tokens = first_of(ctx.tokens(), self.samples, self.length, self.name)
        options = StreamOptions(
            self.batch_size,
            {"auto": None, "model": rw.program.dtype, "float32": torch.float32}[self.precision],
            self.activations,
            reference=self.asymmetric > 0,
            fewest=self.min_expert_tokens,
            importance=token_importance(rw.program, targets, ctx, tokens) if self.guided else None,
        )
        with self._checkpoints(rw, ctx, targets, tokens, options) as checkpoints:
            layers = stream_layers(rw, ctx, targets, tokens, options, self._view())
            for layer in ctx.progress(layers, "gptq", total=len({layer_of(node) for node in targets})):
                rw.record.details |= layer.about
                self._rewrite_layer(rw, ctx, layer, checkpoints)
                if rw.record.limited:
                    break

    def selects(self, node: fx.Node) -> bool:
        return spec(node).product is not None and self.select(node)

    def _targets(self, rw: Rewriter, final: bool = True, peer: Program | None = None) -> list[fx.Node]:
        found = []
        for node in rw.program.products():
            if not self.select(node) or "weight" not in info(node).formats:
                continue
            if reason := _unfit(rw.program, node) or self._beyond(node):
                rw.skip(node, reason)
            else:
                found.append(node)
        # What is skipped before other passes ran may be fit behind them.
        if not found and (final or not rw.record.skips) and not any_weight(peer, self.select):
            first = f"; {rw.record.skips[0].path}: {rw.record.skips[0].reason}" if rw.record.skips else ""
            unfit = f"no linear that select = {str(self.select)!r} matches has a weight format{first}"
            raise ExpectationError(f"gptq takes nothing: {self.select.misses(rw.program.products()) or unfit}")
        return found

    def _beyond(self, node: fx.Node) -> str | None:
        layer = layer_of(node)
        if self.max_layers is None or (layer is not None and layer < self.max_layers):
            return None
        return f"max_layers = {self.max_layers} ends before it"

    def _view(self) -> Callable[[Program], Program]:
        return {None: as_it_stands, True: with_quantizers, False: without_quantizers}[self.quantized_inputs]

    def _checkpoints(
        self, rw: Rewriter, ctx: Context, targets: list[fx.Node], tokens: Tensor, options: StreamOptions
    ) -> AbstractContextManager[LayerCheckpoints | None]:
        directory = self.checkpoint_dir or (ctx.cache / "gptq" if ctx.cache else None)
        if directory is None or not ranks.is_first():
            return nullcontext()
        directory = directory if ctx.phase in ("", self.phase or "decode") else directory / ctx.phase
        foreign = sorted(file.name for file in directory.expanduser().glob("*.safetensors"))
        if foreign:
            rw.warn(f"{directory} holds {foreign[0]} and {len(foreign) - 1} more files of another tool: none is read")
        # Neither max_layers nor bisect's limit changes what a layer becomes: their runs share a folder.
        about: dict[str, object] = {
            "solver": {name: getattr(self, name) for name in _SOLVER},
            "formats": _formats(rw.program, self.select),
            "tokens": token_key(tokens),
            "seed": ctx.seed,
            "stream": options.result_key() | {"view": self._view().__name__},
            "environment": environment(ctx.device),
        }
        view = self._view()(rw.program.copy())
        ends = [node for node in view.graph.nodes if node.op == "output"]
        key = Keys().key(ends, view.weights.hash, {"about": digest(about), "dtype": str(rw.program.dtype)})
        return open_checkpoints(directory, key, about)

    def _rewrite_layer(self, rw: Rewriter, ctx: Context, layer: LayerRun, checkpoints: LayerCheckpoints | None) -> None:
        name = "head" if layer.index is None else f"layer-{layer.index:05d}"
        stored = ranks.from_first(lambda: checkpoints.load(name) if checkpoints else None)
        if checkpoints is not None:
            rw.record.warnings += checkpoints.problems
            checkpoints.problems.clear()
        if stored is not None:
            self._restore(rw, ctx, layer, *stored)
            return
        results: list[dict[str, object]] = []
        pending: dict[fx.Node, list[ExpertResult]] = defaultdict(list)
        for group in layer.groups():
            if isinstance(group, ExpertGroup):
                results += self._rewrite_experts(rw, ctx, layer, group, pending)
            else:
                results += self._rewrite_group(rw, ctx, layer, group)
            if rw.record.limited:
                return
        if checkpoints is not None:
            tensors = {weight: rw.weights[weight] for node in layer.targets for weight in [rw.program.weight_of(node)]}
            checkpoints.save(name, tensors, results)

    def _restore(
        self,
        rw: Rewriter,
        ctx: Context,
        layer: LayerRun,
        tensors: dict[str, Tensor],
        results: list[dict[str, object]],
    ) -> None:
        rw.record.details["resumed_layers"] += 1
        accounts = {account["weight"]: account for account in results}
        for node in layer.targets:
            weight = rw.program.weight_of(node)
            if not rw.match(node, note=str(info(node).formats["weight"].format)):
                return
            self._accept(rw, ctx, node, tensors[weight].to(rw.weights[weight].device), accounts[weight])

    def _rewrite_group(self, rw: Rewriter, ctx: Context, layer: LayerRun, group: Group) -> list[dict[str, object]]:
        """Solve the linears of one group, one batch a format; returns an account of each."""
        by_format: dict[str, list[fx.Node]] = defaultdict(list)
        for node in group.linears:
            fmt = str(info(node).formats["weight"].format)
            if not rw.match(node, note=fmt):
                break
            by_format[fmt].append(node)
        accounts = []
        for nodes in by_format.values():
            weights = [layer.weights.master(rw.program.weight_of(node)) for node in nodes]
            for node, was, result in zip(nodes, weights, self._solve(rw, group, nodes, weights), strict=True):
                weight = rw.program.weight_of(node)
                account = linear_account(node, weight, result, group.statistics.tokens)
                # A clone of its own: the result is a view into the solver's stack.
                rounded = result.weight.clone(memory_format=torch.contiguous_format)
                self._accept(rw, ctx, node, rounded, account, kept_on=rw.weights.behind(weight).device, was=was)
                layer.weights.keep(weight, rounded)
                accounts.append(account)
        return accounts

    def _rewrite_experts(
        self,
        rw: Rewriter,
        ctx: Context,
        layer: LayerRun,
        group: ExpertGroup,
        pending: dict[fx.Node, list[ExpertResult]],
    ) -> list[dict[str, object]]:
        """Solve a range of experts of each stack; a stack whose last range this is goes into the program."""
        moments = group.statistics.moments(group.sources, rw.weights.hash)
        accounts = []
        for node in group.linears:
            fmt, weight = info(node).formats["weight"].format, rw.program.weight_of(node)
            if moments.experts.start == 0 and not rw.match(node, note=str(fmt)):
                break
            try:
                pending[node] += gptq_experts(
                    layer.weights.stored(weight)[moments.experts.start : moments.experts.stop],
                    moments.own,
                    moments.hits[moments.experts.start : moments.experts.stop],
                    fmt,
                    fewest=self.min_expert_tokens,
                    shared=moments.shared,
                    shared_rows=moments.rows,
                    cross=moments.cross,
                    asymmetric=self.asymmetric,
                    ridge=_RIDGE,
                    **self._how(),
                )
            except ValueError as error:
                raise ValueError(f"{weight} (read by {path_of(node)}): {error}") from error
            if moments.experts.stop < len(moments.hits):
                continue
            solved = pending.pop(node)
            rounded = torch.stack([one.solved.weight.to(rw.weights[weight].device) for one in solved])
            accounts.append(expert_account(node, weight, solved, moments.hits, self.min_expert_tokens))
            self._accept(rw, ctx, node, rounded, accounts[-1])
        return accounts

    def _how(self) -> dict[str, Any]:
        return {"damping": self.damp, "order": self.order, "exponents": self.exponents, "refine": self.refine}

    def _solve(self, rw: Rewriter, group: Group, nodes: list[fx.Node], weights: list[Tensor]) -> list[GptqResult]:
        hessian = group.statistics.hessian(group.source, rw.weights.hash)
        cross = group.statistics.cross(group.source, rw.weights.hash) if self.asymmetric else None
        targets = None
        try:
            if cross is not None:
                # Together, for they share the factorization.
                moved = asymmetric_target(torch.cat(weights), hessian, cross, self.asymmetric, _RIDGE)
                targets = list(moved.split([len(w) for w in weights]))
            return gptq_batch(
                weights,
                hessian,
                info(nodes[0]).formats["weight"].format,
                **self._how(),
                targets=targets,
            )
        except ValueError as error:
            names = [rw.program.weight_of(node) for node in nodes]
            broken = [name for name, w in zip(names, weights, strict=True) if not bool(w.isfinite().all())]
            raise ValueError(f"{', '.join(broken or names)} (read by {path_of(nodes[0])}): {error}") from error

    def _accept(
        self,
        rw: Rewriter,
        ctx: Context,
        node: fx.Node,
        rounded: Tensor,
        account: dict[str, object],
        **kept: Any,
    ) -> None:
        """Put a solved weight into the program and its account into the record; ``kept`` as for ``set_weight``."""
        rw.set_weight(str(account["weight"]), rounded, **kept)
        mark_rounded(rw, node, "weight")
        details = dict(account)
        coverage = details.pop("experts", None)
        rw.record.details["linears"].append(details)
        if isinstance(coverage, dict):
            rw.record.details["experts"].append({"path": path_of(node), **coverage})
        message = fallback(node, account)
        if message is None:
            return
        if ctx.strict:
            raise StrictError(f"gptq: {message}")
        rw.record.details["fallbacks"] += 1
        rw.warn(message)


def as_it_stands(program: Program) -> Program:
    """The program with the quantizers that it has."""
    return program


def with_quantizers(program: Program) -> Program:
    """The program with every annotated activation, key and value rounded."""
    rw = Rewriter(program, Gptq.name)
    for pass_ in (InsertFakeQuant(), QuantizeKvCache()):
        pass_.run(rw, Context())
    return program


def _formats(program: Program, select: Selector) -> dict[str, str]:
    """Weight formats of the linears that GPTQ takes when nothing stops it."""
    return {
        node.name: str(info(node).formats["weight"].format)
        for node in program.products()
        if select(node) and "weight" in info(node).formats and _unfit(program, node) is None
    }


def _unfit(program: Program, node: fx.Node) -> str | None:
    """Why GPTQ cannot take the weight of a linear; None if it can."""
    source = weights_of(node).get("weight")
    if source is None:
        return "its weight is computed, not stored"
    if is_rounded(node, "weight"):
        return "its weight is on the grid already"
    if others := [reader for reader in readers_of(program, str(source.target)) if reader is not node]:
        return f"its weight is read by {path_of(others[0]) or others[0].name} too; untie it, or round-weights takes it"
    return None


def _require(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {expected}, got {value}")
