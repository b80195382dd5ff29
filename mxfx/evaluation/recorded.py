"""Forward passes of many batches of one shape: on a GPU recorded once, as one graph of kernels, and replayed.

Of a small model the host takes longer to launch a few thousand kernels than the device to run them.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from mxfx.graph.node import op_name
from mxfx.ground.recording import record

#: Batches of one shape that a recording pays from: it takes three forward passes.
_OFTEN = 12


class _Recorded(NamedTuple):
    graph: torch.cuda.CUDAGraph
    ids: Tensor
    logits: Tensor


class Forward:
    """Logits ``(batch, seq, vocabulary)`` of a model for int64 ``(batch, seq)``, of whose ``shapes`` each comes once.

    Emitted models are recorded for a shape that comes often; those of experts are not, which ask the device how many
    tokens each got. What is recorded goes with this object, and gives the same kernels' bits.
    """

    def __init__(self, shapes: Iterable[tuple[int, ...]] = ()) -> None:
        self._often = {shape for shape, times in Counter(shapes).items() if times >= _OFTEN}
        #: With the model, whose identity is the key.
        self._recorded: dict[tuple[int, tuple[int, ...]], tuple[Any, _Recorded | None]] = {}

    def __call__(self, model: Any, ids: Tensor) -> Tensor:
        """Logits on the model's device, in its dtype; the next call with this model may write over them."""
        shape = tuple(ids.shape)
        if shape not in self._often or not _recordable(model):
            return _logits(model, ids.to(model.device))
        key = (id(model), shape)
        if key not in self._recorded:
            self._recorded[key] = (model, _record(model, ids))
        found = self._recorded[key][1]
        if found is None:
            return _logits(model, ids.to(model.device))
        found.ids.copy_(ids)
        found.graph.replay()
        return found.logits


def _recordable(model: Any) -> bool:
    graph = getattr(model, "graph", None)
    if not isinstance(graph, fx.GraphModule) or model.device.type != "cuda":
        return False
    return not any("expert" in op_name(node) for node in graph.graph.nodes if node.op == "call_function")


def _record(model: Any, ids: Tensor) -> _Recorded | None:
    """None where the device has no room for it."""
    place = ids.to(model.device, copy=True)
    try:
        with torch.no_grad():
            graph, logits = record(lambda: _logits(model, place), place.device)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        warnings.warn(f"evaluation launches kernels one by one, a graph of them failed: {reason}", stacklevel=2)
        return None
    return _Recorded(graph, place, logits)


def _logits(model: Any, ids: Tensor) -> Tensor:
    out = model(input_ids=ids)
    return out.logits if hasattr(out, "logits") else out
