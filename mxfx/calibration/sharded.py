"""Adam spread over ranks (ZeRO, arXiv 1910.02054, stage 1): each keeps the moments of its part of all parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mxfx.calibration.adam import MOMENTS, NORM, Update
from mxfx.ground import ranks


class ShardedUpdate:
    """As ``Update``, for several ranks: each sums, clips and steps its part of the parameters laid end to end.

    Gradients are added in the order of the ranks and the norm is that of all, so every rank gets the same bits; beside
    one process' the sums differ in their last bits. A rank holds two moments and a gradient of its part alone.
    """

    def __init__(self, parameters: list[nn.Parameter], rates: Sequence[float], device: torch.device) -> None:
        for parameter in parameters:
            parameter.data = parameter.data.contiguous()
        self._parameters = parameters
        self._sizes = [parameter.numel() for parameter in parameters]
        self._total = sum(self._sizes)
        self._mine = ranks.share(self._total)
        self._pieces, self._rates = [], []
        start = 0
        for parameter, rate in zip(parameters, rates, strict=True):
            part = slice(max(self._mine.start - start, 0), max(self._mine.stop - start, 0))
            if len(piece := parameter.detach().view(-1)[part]):
                self._pieces.append(piece)
                self._rates.append(rate)
            start += parameter.numel()
        # A place: the recorded step of a GPU reads it.
        self._gradient = torch.zeros(self._mine.stop - self._mine.start, dtype=parameters[0].dtype, device=device)
        for piece, gradient in zip(self._pieces, self._gradient.split(self._lengths), strict=True):
            piece.grad = gradient
        self._update = Update(self._pieces, self._rates, device, clip=False)

    @property
    def _lengths(self) -> list[int]:
        return [len(piece) for piece in self._pieces]

    @torch.no_grad()
    def __call__(self, share: float, gradients: Sequence[Tensor]) -> None:
        """Update all parameters by ``share`` of each rate; ``gradients`` are this rank's part of every sum."""
        self._gradient.copy_(ranks.scattered(torch.cat([gradient.flatten() for gradient in gradients])))
        norm = ranks.summed(self._gradient.square().sum()).sqrt()
        self._gradient.mul_((NORM / (norm + 1e-6)).clamp(max=1))
        self._update(share)
        whole = ranks.joined(torch.cat(self._pieces), 0, self._total).split(self._sizes)
        found = [part.view_as(parameter) for part, parameter in zip(whole, self._parameters, strict=True)]
        torch._foreach_copy_(self._parameters, found)

    def moments(self) -> list[list[Tensor]]:
        """First and second moments of every parameter, in its shape, on all ranks."""
        found = []
        for name in MOMENTS:
            whole = ranks.joined(torch.cat([self._update.state[piece][name] for piece in self._pieces]), 0, self._total)
            parts = zip(whole.split(self._sizes), self._parameters, strict=True)
            found.append([part.view_as(parameter) for part, parameter in parts])
        return found

    def resume(self, step: int, first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
        """Go on behind ``step`` steps from moments of every parameter."""
        parts = [
            torch.cat([moment.flatten() for moment in moments])[self._mine].to(self._gradient.device)
            for moments in (first, second)
        ]
        self._update.resume(step, *([one.clone() for one in part.split(self._lengths)] for part in parts))
