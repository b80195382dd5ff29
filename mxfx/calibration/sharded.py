"""Adam spread over ranks (ZeRO, arXiv 1910.02054, stage 1): each keeps the moments of its part of all parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mxfx.calibration.adam import MOMENTS, NORM, Update
from mxfx.ground import ranks

#: Elements that the place of a parameter is a multiple of: kernels read 16 bytes at a time.
_ALIGNED = 32


class ShardedUpdate:
    """As ``Update``, for several ranks: each sums, clips and steps its part of the parameters laid end to end.

    Gradients are added in the order of the ranks and the norm is that of all, so every rank gets the same bits; beside
    one process' the sums differ in their last bits. A rank holds two moments and a gradient of its part alone.

    The parameters become views of one tensor: a rank's part is a range of it, updated where it lies, and the parts of
    the others arrive in their places. There may be fewer elements than ranks; then some have nothing to update.
    """

    def __init__(self, parameters: list[nn.Parameter], rates: Sequence[float], device: torch.device) -> None:
        self._parameters = parameters
        self._starts, length = [], 0
        for parameter in parameters:
            self._starts.append(length)
            length += -(-parameter.numel() // _ALIGNED) * _ALIGNED
        each = -(-length // (ranks.world() * _ALIGNED)) * _ALIGNED
        self._whole = torch.zeros(each * ranks.world(), dtype=parameters[0].dtype, device=device)
        for parameter, place in zip(parameters, self._places(self._whole), strict=True):
            place.copy_(parameter.detach())
            parameter.data = place
        self._mine = slice(ranks.rank() * each, (ranks.rank() + 1) * each)
        self._part = self._whole[self._mine]
        # Places: the recorded step of a GPU reads them.
        self._gradients, self._gradient = torch.zeros_like(self._whole), torch.zeros_like(self._part)
        #: Of each parameter that this rank has elements of: where they lie in its part.
        self._ranges, mine = [], []
        for parameter, start, rate in zip(parameters, self._starts, rates, strict=True):
            first = max(start, self._mine.start) - self._mine.start
            last = min(start + parameter.numel(), self._mine.stop) - self._mine.start
            if first < last:
                self._ranges.append(slice(first, last))
                mine.append(rate)
        self._pieces = [self._part[range_] for range_ in self._ranges]
        for piece, range_ in zip(self._pieces, self._ranges, strict=True):
            piece.grad = self._gradient[range_]
        self._update = Update(self._pieces, mine, device, clip=False) if self._pieces else None

    def _places(self, whole: Tensor) -> list[Tensor]:
        """Every parameter's place in a tensor that is laid out as the parameters are."""
        return [
            whole[start : start + parameter.numel()].view(parameter.shape)
            for start, parameter in zip(self._starts, self._parameters, strict=True)
        ]

    @torch.no_grad()
    def add(self, share: float) -> None:
        """Add ``share`` of the gradients that stand in the parameters' ``grad`` to those of the next update."""
        given = zip(self._places(self._gradients), self._parameters, strict=True)
        found = [(place, parameter.grad) for place, parameter in given if parameter.grad is not None]
        places, grads = [place for place, _ in found], [grad for _, grad in found]
        torch._foreach_add_(places, grads, alpha=share)

    @torch.no_grad()
    def __call__(self, share: float) -> None:
        """Update all parameters by ``share`` of each rate, along the gradients that all ranks added since the last."""
        self._gradient.copy_(ranks.scattered(self._gradients))
        self._gradients.zero_()
        norm = ranks.summed(self._gradient.square().sum()).sqrt()
        self._gradient.mul_((NORM / (norm + 1e-6)).clamp(max=1))
        if self._update is not None:
            self._update(share)
        ranks.filled(self._whole)

    def moments(self) -> list[list[Tensor]]:
        """First and second moments of every parameter, in its shape, on all ranks."""
        found = []
        for name in MOMENTS:
            whole = torch.zeros_like(self._whole)
            part = whole[self._mine]
            for piece, range_ in zip(self._pieces, self._ranges, strict=True):
                assert self._update is not None
                part[range_] = self._update.state[piece][name]
            found.append(self._places(ranks.filled(whole)))
        return found

    def resume(self, step: int, first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
        """Go on behind ``step`` steps from moments of every parameter."""
        if self._update is None:
            return
        parts = []
        for moments in (first, second):
            whole = torch.zeros_like(self._whole)
            for place, moment in zip(self._places(whole), moments, strict=True):
                place.copy_(moment)
            parts.append([whole[self._mine][range_].clone() for range_ in self._ranges])
        self._update.resume(step, *parts)
