"""What the float model says of calibration samples; its decoder layers see each of them once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mxfx.calibration.staged import Staged
from mxfx.ground import ranks
from mxfx.rewrite import Context

#: Of a GPU's free memory, what states may take; and what they may on a CPU.
_SHARE = 0.25
_CPU_BYTES = 2 << 30


@dataclass(frozen=True)
class Samples:
    """Token ids ``(samples, seq)`` and, where they are kept, the float model's states ``(samples, seq, hidden)``."""

    ids: Tensor
    states: Tensor | None

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, chosen: Tensor | slice) -> tuple[Tensor, ...]:
        """The chosen samples: their ids and what is kept of them."""
        if isinstance(chosen, Tensor):
            chosen = chosen.to(self.ids.device, non_blocking=True)
        return tuple(tensor[chosen] for tensor in (self.ids, self.states) if tensor is not None)


class Teacher:
    """A float model whose states before the head are kept: of a step it costs one product, not a forward pass."""

    def __init__(self, model: Staged, ctx: Context) -> None:
        self._model = model
        self._ctx = ctx

    def samples(self, tokens: Tensor, batch_size: int, *, often: bool) -> Samples:
        """``tokens`` on the device; with their states where these fit and the samples are seen ``often``."""
        ids = tokens.to(self._ctx.device)
        if not often or not self._model.has_states:
            return Samples(ids, None)
        with torch.no_grad():
            first = self._model.states(ids[:1])
            # One decision for all ranks, which meet below.
            if len(ids) * first.nbytes > min(ranks.collected(self._room())):
                return Samples(ids, None)
            mine = ids[ranks.share(len(ids))]
            states = first.new_empty(len(mine), *first.shape[1:])
            places = torch.arange(len(mine), device=ids.device).split(batch_size) if len(mine) else ()
            for chosen in self._ctx.progress(places, "states of the float model", len(places)):
                states[chosen] = self._model.states(mine[chosen])
            states = ranks.joined(states, 0, len(ids))
        return Samples(ids, states)

    @torch.no_grad()
    def logits(self, ids: Tensor, states: Tensor | None = None) -> Tensor:
        """Logits ``(batch, seq, vocabulary)`` of what ``Samples.take`` gave."""
        return self._model(ids) if states is None else self._model.logits(states)

    def _room(self) -> float:
        if self._ctx.device.type != "cuda":
            return _CPU_BYTES
        device = self._ctx.device
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return _SHARE * (torch.cuda.mem_get_info(device)[0] + unused)
