"""Steps of decoding as recorded CUDA graphs, on a CPU as tapes: one for each batch size and room of a cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from mxfx.ground.recording import record
from mxfx.ops.kernels.library import load_cpu
from mxfx.runtime.cache import Storage

_RECORDED = "decode step"


def replayed(
    graph: fx.GraphModule, storage: Storage, ids: Tensor, positions: Tensor, mask: Tensor | None, past: int
) -> Tensor:
    """Logits ``(batch, 1, vocabulary)`` of one token a text, which takes slot ``past``; recorded at the first call.

    ``ids`` and ``positions`` are ``(batch, 1)``, ``mask`` is ``(batch, past + 1)``.
    """
    step = storage.attached.get(_RECORDED)
    if step is None:
        # Made for inference, no call outside of it could write to its inputs.
        with torch.inference_mode(False):
            step = storage.attached[_RECORDED] = RecordedStep(graph, storage)
    assert isinstance(step, RecordedStep)
    return step(ids, positions, mask, past)


def records(device: torch.device) -> bool:
    """Whether steps are recorded on a device: on a CPU only where its kernels are, and not within other tools."""
    if device.type == "cpu":
        return load_cpu() is None and not torch.compiler.is_compiling() and not _get_current_dispatch_mode_stack()
    return device.type == "cuda"


def _tape(graph: fx.GraphModule) -> Callable[[dict[str, Tensor]], Tensor]:
    from mxfx.runtime.taped import TapedStep

    return TapedStep(graph)


class RecordedStep:
    """A step on the tensors of one storage: how many slots are filled is read from ``slots``, on the device."""

    def __init__(self, graph: fx.GraphModule, storage: Storage) -> None:
        device = next(iter(storage.tensors.values())).device
        batch = storage.batch
        self._ids = torch.zeros((batch, 1), dtype=torch.int64, device=device)
        self._positions = torch.zeros((batch, 1), dtype=torch.int64, device=device)
        self._slots = torch.zeros(1, dtype=torch.int64, device=device)
        self._mask = torch.ones((batch, storage.room), dtype=torch.bool, device=device)
        # Not the storage, which holds this step: a ring of references would keep its gigabytes until a collection.
        self._graph, self._tensors = graph, storage.tensors
        self._taped = _tape(graph) if device.type == "cpu" else None
        self.recording: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None

    def __call__(self, ids: Tensor, positions: Tensor, mask: Tensor | None, past: int) -> Tensor:
        self._ids.copy_(ids)
        self._positions.copy_(positions)
        self._slots.fill_(past)
        if mask is None:
            self._mask.fill_(True)
        else:
            self._mask[:, : mask.shape[1]].copy_(mask)
        if self._taped is not None:
            named = {"input_ids": self._ids, "position_ids": self._positions, "attention_mask": self._mask}
            return self._taped({**named, "slots": self._slots, **self._tensors})
        if self.recording is None:
            self._record()
        assert self.recording is not None and self._logits is not None
        self.recording.replay()
        return self._logits.clone()

    def _step(self) -> Tensor:
        logits: Tensor = self._graph(self._ids, self._positions, self._mask, slots=self._slots, **self._tensors)
        return logits

    def _record(self) -> None:
        """Each time the same token is written to the same slot."""
        with torch.no_grad():
            self.recording, self._logits = record(self._step, self._ids.device)
