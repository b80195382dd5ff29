"""What rounding the operands of a linear would cost in KL, from one pass over data with gradients.

A small change δ of a tensor costs ½ E[(δ · ∇ log p(y))²] (``mxfx.calibration.fisher``). For a linear y = x Wᵀ,
rounding x and W changes y by δ = Q(x) Q(W)ᵀ − x Wᵀ. Errors at different tokens either count as independent (the squares
are summed over tokens: little noise) or not (the sum over a sample's tokens is squared: true also where attention adds
up errors that tokens share, as behind a value projection, and noisy): the larger figure is taken. All linears and all
formats are measured in the same pass: the cost grows with the layers, not with their combinations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from mxfx.calibration.fisher import differentiate
from mxfx.calibration.spread import parts
from mxfx.calibration.training import trainable
from mxfx.formats import Format
from mxfx.graph.program import Program
from mxfx.ground import ranks
from mxfx.rewrite import Context


@dataclass(frozen=True)
class Operands:
    """The formats of a linear's weight and input; None leaves one as it is."""

    weight: Format | None
    input: Format | None


def kl_of_rounding(
    program: Program, linears: Sequence[fx.Node], formats: Sequence[Operands], tokens: Tensor, ctx: Context
) -> dict[str, list[float]]:
    """By name of a linear, the KL in nats a token that each of ``formats`` would add if it alone were rounded.

    ``tokens`` are int64 ``(samples, length)``, one sample at a time; ``linears`` are nodes of ``program``.
    """
    module, _ = trainable(program, {}, ctx.device)
    # In an order that all ranks have: they add these up one by one.
    sums = {node.name: torch.zeros(2, len(formats), dtype=torch.float64) for node in linears}
    generator = torch.Generator(ctx.device).manual_seed(int(ctx.generator("sensitivity").initial_seed()) % 2**63)
    samples = parts(tokens, 1)
    for part in ctx.progress(samples, "sensitivities", len(samples)):
        logits = _Watched(module, formats, sums).run(part.ids.to(ctx.device), None, None)
        differentiate(logits, part, generator)
    return {name: (0.5 * ranks.summed(own) / tokens.numel()).amax(0).tolist() for name, own in sums.items()}


class _Watched(fx.Interpreter):
    """Runs a module; at each watched linear, its output's gradient meets what rounding would change there."""

    def __init__(self, module: fx.GraphModule, formats: Sequence[Operands], sums: Mapping[str, Tensor]) -> None:
        super().__init__(module)
        self._formats = formats
        self._sums = sums

    def run_node(self, n: fx.Node) -> object:
        result = super().run_node(n)
        if n.name not in self._sums:
            return result
        (x, weight, *others), named = self.fetch_args_kwargs_from_env(n)
        x, weight, exact = x.detach(), weight.detach(), result.detach()

        def product(x: Tensor, weight: Tensor) -> Tensor:
            return self.call_function(n.target, (x, weight, *others), named)

        if not result.requires_grad:
            result.requires_grad_()
        result.register_hook(lambda gradient: self._add(n.name, product, x, weight, exact, gradient))
        return result

    @torch.no_grad()
    def _add(
        self,
        name: str,
        product: Callable[[Tensor, Tensor], Tensor],
        x: Tensor,
        weight: Tensor,
        exact: Tensor,
        gradient: Tensor,
    ) -> None:
        for index, operands in enumerate(self._formats):
            there = x if operands.input is None else operands.input.fake_quantize(x)
            w = weight if operands.weight is None else operands.weight.fake_quantize(weight)
            # By the product itself: of a stack of experts each token reads its own.
            change = product(there, w).float() - exact.float()
            each = (change * gradient.float()).sum(-1).double()
            self._sums[name][:, index] += torch.stack([each.square().sum(), each.sum().square()]).cpu()
