"""``distill``: tune weights on their grids so that the quantized model says what the float model says."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from mxfx.calibration.training import GradientStep, divergence, trainable
from mxfx.formats import Format
from mxfx.graph.node import info, path_of
from mxfx.rewrite import ALL, Context, Lossy, Numerics, Pass, Rewriter, Selector, register
from mxfx.rewrite.operands import is_rounded, mark_rounded, readers_of


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
    begin with GPTQ's. ``held_out`` of the samples are kept apart; if the KL on them did not fall, the weights are only
    rounded to nearest and the run is warned. The device holds both models and 16 bytes for each weight that is tuned.
    """

    name: ClassVar[str] = "distill"
    requires: ClassVar[frozenset[str]] = frozenset({"annotated", "activations-quantized"})
    provides: ClassVar[frozenset[str]] = frozenset({"weights-rounded"})
    forbids: ClassVar[frozenset[str]] = frozenset({"lowered", "quantizers-fused"})
    numerics: ClassVar[Numerics] = Lossy()
    select: Selector = ALL
    steps: int = 240
    learning_rate: float = 1e-3
    batch_size: int = 4
    held_out: float = 0.0625

    def __post_init__(self) -> None:
        for name, low in (("steps", 1), ("batch_size", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"{name!r} is {getattr(self, name)}, must be at least {low}")
        if not self.learning_rate > 0:
            raise ValueError(f"'learning_rate' is {self.learning_rate}, must be positive")
        if not 0 < self.held_out < 1:
            raise ValueError(f"'held_out' is {self.held_out}, must lie between 0 and 1")

    def run(self, rw: Rewriter, ctx: Context) -> None:
        if ctx.reference is None:
            raise ValueError("distill needs the float model that the pipeline began with; run it through a PassManager")
        found = self._targets(rw)
        formats = {weight: info(nodes[0]).formats["weight"].format for weight, nodes in found.items()}
        targets = {weight: nodes for weight, nodes in found.items() if rw.match(nodes[0], note=str(formats[weight]))}
        taken = {weight: formats[weight] for weight in targets}
        if not targets:
            rw.warn("nothing to tune: no selected linear has a weight format")
            return
        student, parameters = trainable(rw.program, taken, ctx.device)
        teacher, _ = trainable(ctx.reference, {}, ctx.device)
        train, kept = _split(ctx.tokens(), self.held_out)
        before = _mean_kl(student, teacher, kept, ctx)
        self._train(student, teacher, parameters, train, ctx)
        after = _mean_kl(student, teacher, kept, ctx)
        rw.record.details |= {"held_out_kl": {"before": before, "after": after}, "held_out_samples": len(kept)}
        if not after < before:
            rw.warn(f"no weight was tuned: KL on held-out samples went from {before:.4f} to {after:.4f}")
            parameters = {}
        for weight, nodes in targets.items():
            self._round(rw, weight, nodes, parameters.get(weight))

    def _round(self, rw: Rewriter, weight: str, nodes: list[fx.Node], tuned: Tensor | None) -> None:
        """Put a tuned weight on its grid into the program; without one, the weight that it began with."""
        if tuned is None and all(is_rounded(node, "weight") for node in nodes):
            return
        latent = rw.weights.master(weight) if tuned is None else tuned.detach()
        fmt = info(nodes[0]).formats["weight"].format
        rw.set_weight(weight, fmt.fake_quantize(latent).to(rw.weights[weight].device))
        for node in nodes:
            if not is_rounded(node, "weight"):
                mark_rounded(rw, node, "weight")

    def _targets(self, rw: Rewriter) -> dict[str, list[fx.Node]]:
        """Weight → the linears that read it, all in one format."""
        found: dict[str, list[fx.Node]] = {}
        for node in rw.program.nodes("linear"):
            if not self.select(path_of(node)) or "weight" not in info(node).formats:
                continue
            weight = rw.weights.canonical(rw.program.weight_of(node))
            readers = readers_of(rw.program, weight)
            if {str(_format(r)) for r in readers} != {str(_format(node))}:
                rw.skip(node, f"{weight} is read in different formats")
                continue
            found[weight] = readers
        return found

    def _train(
        self,
        student: nn.Module,
        teacher: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        tokens: Tensor,
        ctx: Context,
    ) -> None:
        # A step of Adam moves every weight about alike; only against a weight's own scale does that mean the same.
        scales = {p: float(p.detach().square().mean().sqrt()) for p in parameters.values()}
        groups = [{"params": [p], "lr": self.learning_rate * scale} for p, scale in scales.items()]
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95), fused=ctx.device.type == "cuda")
        generator = ctx.generator("distill")
        size = min(self.batch_size, len(tokens))
        rounds = math.ceil(self.steps * size / len(tokens))
        order = torch.cat([torch.randperm(len(tokens), generator=generator) for _ in range(rounds)])
        batches = order[: self.steps * size].split(size)
        warm = max(1, self.steps // 20)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * step / self.steps)))
        )
        tuned = list(parameters.values())
        step = GradientStep(lambda ids: _kl(student, teacher, ids), tuned, ctx.device)
        for batch in ctx.progress(batches, "distill", self.steps):
            step(tokens[batch])
            torch.nn.utils.clip_grad_norm_(tuned, 1.0)
            optimizer.step()
            schedule.step()


def _format(node: fx.Node) -> Format | None:
    found = info(node).formats.get("weight")
    return None if found is None else found.format


def _split(tokens: Tensor, held_out: float) -> tuple[Tensor, Tensor]:
    """The last samples, at least one, are kept apart. Raises ``ValueError`` where none is left to train on."""
    kept = max(1, round(len(tokens) * held_out))
    if kept >= len(tokens):
        raise ValueError(f"distill needs at least two calibration samples, got {len(tokens)}")
    return tokens[:-kept], tokens[-kept:]


def _kl(student: nn.Module, teacher: nn.Module, ids: Tensor) -> Tensor:
    """Mean KL(teacher ‖ student) of the next token, nats."""
    with torch.no_grad():
        expected = teacher(ids)
    return divergence(student(ids), expected)


def _mean_kl(student: nn.Module, teacher: nn.Module, tokens: Tensor, ctx: Context) -> float:
    with torch.no_grad():
        parts = [_kl(student, teacher, ids.to(ctx.device)) * len(ids) for ids in tokens.split(8)]
    return float(torch.stack(parts).sum()) / len(tokens)
