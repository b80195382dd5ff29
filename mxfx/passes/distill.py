"""``distill``: tune weights on their grids so that the quantized model says what the float model says."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx, nn

from mxfx.calibration.distillation import Distillation, History, Plan
from mxfx.calibration.estimate import SHARE, free_bytes
from mxfx.calibration.keys import Keys, digest, environment, token_key
from mxfx.calibration.layerwise import LayeredModel, tune_layers
from mxfx.calibration.staged import Staged
from mxfx.calibration.teacher import Samples, Teacher
from mxfx.calibration.training import deterministic, divergence, failure, invertible, trainable
from mxfx.formats import Format
from mxfx.graph.node import info, kind
from mxfx.graph.program import Program
from mxfx.ground import ranks
from mxfx.ops.catalogue import spec, weights_of
from mxfx.rewrite import ALL, Context, Lossy, Numerics, Pass, Rewriter, Selector, register
from mxfx.rewrite.basis import bias_of
from mxfx.rewrite.facts import (
    ACTIVATIONS_QUANTIZED,
    ANNOTATED,
    CALIBRATED,
    LOWERED,
    QUANTIZERS_FUSED,
    WEIGHTS_ROUNDED,
    Fact,
)
from mxfx.rewrite.operands import is_rounded, mark_rounded, readers_of

#: What may be tuned beside the weights on grids; none of it costs anything at inference.
Free = Literal["gains", "biases", "transforms", "embedding", "head"]

#: Samples that are enough to tell states apart.
_MOST_HELD_OUT = 64
#: Of which so many run together.
_AT_ONCE = 8
#: Where compiled layers pay: a CPU takes minutes to compile what it then runs no faster.
_COMPILED = {"cuda"}


@register
@dataclass(frozen=True)
class Distill(Pass):
    """Tune quantized weights, end to end, against the next-token distribution of the float model.

    Before::

        %x4 = mxfx.fake_quantize(%x, …); %y = linear(%x4, @w)      {weight: mxint4@32}

    After::

        %y = linear(%x4, @w')       # w' on the grid; min KL(float ‖ quantized) on calibration tokens

    Knowledge distillation (arXiv 1503.02531, §2) through straight-through quantizers (arXiv 1308.3432): every forward
    pass rounds the weights, activations and cache as the emitted model does, the gradient passes them as the identity.
    It sees logits of the float model, no labels, so it cannot make the model better than its teacher on a domain.

    ``steps`` of ``batch_size`` calibration samples each; ``learning_rate`` is in units of each weight's root mean
    square. Weights that no pass has rounded yet begin where they are and end on their grids, which works better than to
    begin with GPTQ's. No sample comes twice before all have come. ``held_out`` of the samples, at most 64, are kept
    apart: the state with the least KL on them is taken; if none is better than the first, the weights are only rounded
    to nearest and the run is warned. The device holds both models and 16 bytes for each weight that is tuned; where
    they fit a quarter of its free memory, also the float model's last states of all samples, each computed once.

    Several processes share the samples of a batch and Adam's moments (12 + 8 / N bytes a tuned weight and N processes,
    4 more for sums), but each holds both models and all parameters: these are not sharded (no FSDP). Where that is more
    than the device has free, the pass is refused before it begins, with both figures; ``scope = "layer"`` is for such
    models.

    scope: ``model`` tunes all weights together; ``layer`` each decoder layer in turn, so that it makes of quantized
        inputs what the float layer makes of float ones: the device holds one layer and a batch, not the model, the host
        the rest (two hidden states a token). What lies in no layer is rounded to nearest; a weight of several layers is
        tuned in the first. Refused where layers share more than a state that tokens decide (keys, values).
    steps: steps of the optimizer; with ``scope = "layer"`` in each layer.
    learning_rate: of Adam, relative to each tensor's root mean square (zeros stay); warm-up, then a cosine to zero.
    batch_size: calibration samples a step.
    held_out: share of the samples that states are compared on, between 0 and 1.
    tune: what is tuned beside the weights on grids: gains (of norms), biases, transforms (their matrices stay
        invertible), embedding, head; without a format these stay in the model's own precision.
    accumulate: parts of one size, as many at least, that a batch is cut into where the device cannot hold it whole.
    recompute: keep only what crosses from layer to layer, and run each layer again for its gradient.
    compile: on a GPU, run decoder layers through ``torch.compile`` while tuning, not while states are compared: faster
        after half a minute, with other last bits; where it fails the run is warned and goes on without.
    deterministic: take only kernels that give the same bits each time, so that a run on a GPU can be repeated and
        resumed byte for byte; slower, not with ``compile``, and ``CUBLAS_WORKSPACE_CONFIG=:4096:8`` has to be set.
    checks: how often the held-out samples are measured.
    checkpoint_every: steps between checkpoints in OUT/NAME/cache, 16 bytes a tuned weight, 4 when done; 0 writes none.
    average: steps that a moving average of the tuned weights, from before they are rounded, reaches back over (its
        decay is 1 - 1 / average): at each check another candidate for the state that is taken; a check takes twice the
        time, the device holds 4 more bytes a weight; 0 keeps none.
    """

    name: ClassVar[str] = "distill"
    requires: ClassVar[frozenset[Fact]] = frozenset({ANNOTATED, ACTIVATIONS_QUANTIZED})
    provides: ClassVar[frozenset[Fact]] = frozenset({WEIGHTS_ROUNDED, CALIBRATED})
    forbids: ClassVar[frozenset[Fact]] = frozenset({LOWERED, QUANTIZERS_FUSED})
    numerics: ClassVar[Numerics] = Lossy()
    select: Selector = ALL
    steps: int = 240
    learning_rate: float = 1e-3
    batch_size: int = 4
    held_out: float = 0.0625
    scope: Literal["model", "layer"] = "model"
    tune: tuple[Free, ...] = ()
    accumulate: int = 1
    recompute: bool = False
    compile: bool = False
    deterministic: bool = False
    checks: int = 8
    checkpoint_every: int = 0
    average: int = 0

    def __post_init__(self) -> None:
        least = {"steps": 1, "batch_size": 1, "accumulate": 1, "checks": 1, "checkpoint_every": 0, "average": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name!r} is {getattr(self, name)}, must be at least {low}")
        if self.compile and self.deterministic:
            raise ValueError(
                "'compile' and 'deterministic' exclude each other: compiled kernels are tuned anew each run"
            )
        for name in ("compile", "recompute"):
            if getattr(self, name) and self.scope == "layer":
                raise ValueError(f"{name!r} goes with scope = 'model' alone")
        outside = sorted({"embedding", "head"} & set(self.tune))
        if outside and self.scope == "layer":
            raise ValueError(
                f"'tune' names {' and '.join(outside)}, in no decoder layer: leave that out or take scope = 'model'"
            )
        if self.accumulate > self.batch_size:
            raise ValueError(
                f"'accumulate' is {self.accumulate}, more parts than the {self.batch_size} samples of 'batch_size'"
            )
        if not self.learning_rate > 0:
            raise ValueError(f"'learning_rate' is {self.learning_rate}, must be positive")
        if not 0 < self.held_out < 1:
            raise ValueError(f"'held_out' is {self.held_out}, must lie between 0 and 1")

    def provided(self) -> frozenset[Fact]:
        """A part of the weights leaves something to calibrate."""
        return self.provides if self.select == ALL else self.provides - {CALIBRATED}

    def foresee(self, rw: Rewriter) -> int | None:
        return len(self._targets(rw))

    def run(self, rw: Rewriter, ctx: Context) -> None:
        if ctx.reference is None:
            raise ValueError("distill needs the float model that the pipeline began with; run it through a PassManager")
        found = self._targets(rw)
        formats = {weight: _format(nodes[0]) for weight, nodes in found.items()}
        targets = {weight: nodes for weight, nodes in found.items() if rw.match(nodes[0], note=str(formats[weight]))}
        grids = {weight: fmt for weight in targets if (fmt := formats[weight]) is not None}
        if not grids:
            rw.warn("nothing to tune: no selected linear or embedding has a weight format")
            return
        free = free_weights(rw.program, self.tune, self.select) - set(grids)
        if still := [name for name in sorted({*grids, *free}) if not rw.weights[name].any()]:
            more = f" and {len(still) - 1} more" if len(still) > 1 else ""
            rw.warn(f"{still[0]}{more} stay as they are, all zeros: steps are in units of a weight's root mean square")
        tune = self._end_to_end if self.scope == "model" else self._by_layer
        with deterministic(ctx.device) if self.deterministic else nullcontext():
            tuned = tune(rw, ctx, grids, free)
        for weight, nodes in targets.items():
            _round(rw, weight, nodes, formats[weight], tuned.get(weight))
        for weight in sorted(free & set(tuned)):
            rw.set_weight(weight, tuned[weight].detach().to(rw.weights[weight].device))

    def _end_to_end(self, rw: Rewriter, ctx: Context, grids: Mapping[str, Format], free: set[str]) -> dict[str, Tensor]:
        """Weights by name, tuned so that the logits agree; none where that made nothing better."""
        assert ctx.reference is not None
        self._check_room(rw.program, ctx, [*grids, *free])
        student, parameters = trainable(rw.program, grids, ctx.device, free=free)
        teacher = Teacher(Staged(trainable(ctx.reference, {}, ctx.device)[0]), ctx)
        plan = self._plan()
        tokens, last = _split(ctx.tokens(), self.held_out)
        part = plan.part(len(tokens))
        often = self.steps * self.batch_size > len(tokens)
        train = teacher.samples(tokens, part, often=often)
        kept = teacher.samples(last, part, often=self.checks > 1)
        matrices = [parameters[name] for name in sorted(free & free_weights(rw.program, ("transforms",), ALL))]
        # Who cuts batches into parts has no room for more.
        at_once = _AT_ONCE if self.accumulate == 1 else part
        compiled = self.compile and ctx.device.type in _COMPILED
        run = Staged(student, recompute=self.recompute, compiled=compiled)

        def loss(*given: Tensor) -> Tensor:
            return divergence(run(given[0]), teacher.logits(*given))

        def check() -> float:
            found = _mean_kl(student, teacher, kept, at_once)
            # A matrix that lost its inverse would be no change of basis any more.
            return found if invertible(matrices) else math.inf

        if compiled and (reason := failure(loss, train.take(slice(part)), parameters)):
            rw.warn(f"torch.compile does not take the layers, which run as they are: {reason}")
            run = Staged(student, recompute=self.recompute)
        loop = Distillation(
            plan,
            parameters,
            loss,
            check,
            train.take,
            len(train),
            ctx,
            file=self._file(rw.program, ctx, grids),
        )
        history = loop.run()
        self._account(rw, history, len(kept), sorted(free))
        if history.best_step:
            return dict(parameters)
        last = history.held_out[max(history.held_out)]
        rw.warn(
            f"no weight was tuned: KL on held-out samples went from {history.held_out[0]:.4f} to {last:.4f} at the end"
        )
        return {}

    def bytes_of(self, tuned: int, world: int = 1) -> int:
        """What so many tuned weights take on the device of one of ``world`` processes: parameter and gradient in
        float32, two moments, of several processes the sums that they exchange, and what is averaged.
        """
        return tuned * (8 + 4 * (world > 1) + 4 * (self.average > 0)) + -(-8 * tuned // world)

    def _check_room(self, program: Program, ctx: Context, tuned: list[str]) -> None:
        """Raise ``ValueError`` where the device does not hold what the pass will."""
        assert ctx.reference is not None
        models = sum(
            tensor.numel() * one.dtype.itemsize
            for one in (program, ctx.reference)
            for tensor in one.weights.values()
            if tensor.device.type != ctx.device.type or tensor.dtype != one.dtype
        )
        count = sum(program.weights[name].numel() for name in tuned)
        needed, free = models + self.bytes_of(count, ranks.world()), free_bytes(ctx.device)
        if needed > SHARE * free:
            raise ValueError(
                f"scope = 'model' takes {needed / 1e9:.2f} GB on {ctx.device} beside activations and logits, and "
                f"{free / 1e9:.2f} GB are free: each process holds both models and every parameter (Adam's moments "
                "alone are spread over processes; parameters are not sharded). Take scope = 'layer' and compile = "
                "false, which hold one layer at a time, or let select take fewer weights"
            )

    def _by_layer(self, rw: Rewriter, ctx: Context, grids: Mapping[str, Format], free: set[str]) -> dict[str, Tensor]:
        """Weights by name, each decoder layer's tuned so that its output agrees with the float layer's."""
        assert ctx.reference is not None
        cpu = torch.device("cpu")
        module, parameters = trainable(rw.program, grids, ctx.device, free=free, home=cpu)
        student = LayeredModel(module, ctx.device)
        teacher = LayeredModel(trainable(ctx.reference, {}, ctx.device, home=cpu)[0], ctx.device)
        train, kept = _split(ctx.tokens(), self.held_out)
        file = self._file(rw.program, ctx, grids)
        matrices = free & free_weights(rw.program, ("transforms",), ALL)
        layers = tune_layers(
            student,
            teacher,
            parameters,
            # Lowering adds constants that the program does not name.
            lambda name: rw.weights.canonical(name) if name in rw.weights else name,
            self._plan(),
            torch.cat([train, kept]),
            len(kept),
            ctx,
            lambda index: None if file is None else file.with_stem(f"{file.stem}-layer-{index}"),
            matrices,
        )
        errors = [{"before": one.held_out[0], "after": one.best, "best_step": one.best_step} for one in layers]
        rw.record.details |= {"held_out_error_by_layer": errors, "held_out_samples": len(kept)}
        idle = sum(not error["best_step"] for error in errors)
        if idle:
            rw.warn(f"{idle} of {len(errors)} layers were not tuned: the error on held-out samples did not fall")
        return dict(parameters)

    def _plan(self) -> Plan:
        every = max(1, self.steps // self.checks)
        return Plan(
            self.steps,
            self.batch_size,
            self.learning_rate,
            self.accumulate,
            every,
            self.checkpoint_every,
            self.average,
        )

    def _account(self, rw: Rewriter, history: History, kept: int, free: list[str]) -> None:
        rw.record.details |= {
            "held_out_kl": {"before": history.held_out[0], "after": history.best},
            "held_out_by_step": {str(step): loss for step, loss in history.held_out.items()},
            "averaged_by_step": {str(step): loss for step, loss in history.averaged.items()},
            "best_step": history.best_step,
            "best_is_average": history.best_is_average,
            "held_out_samples": kept,
            "tuned_beside_grids": len(free),
        }

    def _file(self, program: Program, ctx: Context, grids: Mapping[str, Format]) -> Path | None:
        if ctx.cache is None or not self.checkpoint_every:
            return None
        assert ctx.reference is not None
        models = [
            Keys().key([n for n in one.graph.nodes if n.op == "output"], one.weights.hash, {"dtype": str(one.dtype)})
            for one in (ctx.reference, program)
        ]
        key = digest(
            {
                "models": models,
                "formats": {weight: str(fmt) for weight, fmt in grids.items()},
                # Those that are held out too: they choose the state.
                "tokens": token_key(ctx.tokens()),
                "pass": [repr(self), ctx.seed],
                "environment": environment(ctx.device),
            }
        )
        return ctx.cache / f"distill-{key}.safetensors"

    def selects(self, node: fx.Node) -> bool:
        return (spec(node).product is not None or kind(node) == "embedding") and self.select(node)

    def _targets(self, rw: Rewriter) -> dict[str, list[fx.Node]]:
        """Weight → the linears and embeddings that read it, all in one format."""
        found: dict[str, list[fx.Node]] = {}
        for node in filter(self.selects, rw.program.nodes()):
            if "weight" not in info(node).formats:
                continue
            source = weights_of(node).get("weight")
            if source is None:
                rw.skip(node, "its weight is computed, not stored")
                continue
            weight = rw.weights.canonical(str(source.target))
            readers = readers_of(rw.program, weight)
            if {str(_format(r)) for r in readers} != {str(_format(node))}:
                rw.skip(node, f"{weight} is read in different formats")
                continue
            found[weight] = readers
        return found


def free_weights(program: Program, kinds: tuple[Free, ...], select: Selector) -> set[str]:
    """Canonical names of the weights of those kinds that selected nodes read."""
    last = next((n for n in reversed(program.graph.nodes) if kind(n) == "linear"), None)
    wanted: set[str] = set()
    for node in program.graph.nodes:
        if not select(node):
            continue
        stored = {name: str(source.target) for name, source in weights_of(node).items()}
        names = {
            "gains": stored.get("weight") if kind(node) in ("rms_norm", "layer_norm") else None,
            "biases": bias_of(node),
            "transforms": stored.get("matrix"),
            "embedding": stored.get("weight") if kind(node) == "embedding" else None,
            "head": stored.get("weight") if node is last else None,
        }
        wanted |= {program.weights.canonical(name) for of, name in names.items() if name is not None and of in kinds}
    return wanted


def _round(rw: Rewriter, weight: str, nodes: list[fx.Node], fmt: Format | None, tuned: Tensor | None) -> None:
    """Put a tuned weight on its grid into the program; without one, the weight that it began with."""
    assert fmt is not None
    if tuned is None and all(is_rounded(node, "weight") for node in nodes):
        return
    latent = rw.weights.master(weight) if tuned is None else tuned.detach()
    rw.set_weight(weight, fmt.fake_quantize(latent).to(rw.weights[weight].device))
    for node in nodes:
        if not is_rounded(node, "weight"):
            mark_rounded(rw, node, "weight")


def _format(node: fx.Node) -> Format | None:
    found = info(node).formats.get("weight")
    return None if found is None else found.format


def _split(tokens: Tensor, held_out: float) -> tuple[Tensor, Tensor]:
    """The last samples, at least one, are kept apart. Raises ``ValueError`` where none is left to train on."""
    kept = min(max(1, round(len(tokens) * held_out)), _MOST_HELD_OUT)
    if kept >= len(tokens):
        raise ValueError(f"distill needs at least two calibration samples, got {len(tokens)}")
    return tokens[:-kept], tokens[-kept:]


def _mean_kl(student: nn.Module, teacher: Teacher, kept: Samples, at_once: int) -> float:
    """Mean KL(teacher ‖ student) of the next token, nats; ``at_once`` samples run together."""
    starts = range(0, len(kept), at_once)
    with torch.no_grad():
        parts = []
        for start in starts[ranks.share(len(starts))]:
            given = kept.take(slice(start, start + at_once))
            parts.append(divergence(student(given[0]), teacher.logits(*given)) * len(given[0]))
    total = float(torch.stack(parts).sum()) if parts else 0.0
    return sum(ranks.collected(total)) / len(kept)
