"""RoPE whose frequencies depend on the length (``dynamic``, ``longrope``), as a function of positions.

transformers keeps these frequencies in a buffer that each forward pass writes. A program keeps no state: here they
follow from the largest position of the call, ``mxfx::length``, as they do in the first forward pass of a model. So a
step with a cache takes the frequencies of the length so far, and keys that lie in the cache keep those that they had.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import unwrap
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

_TABLES, _FORMULA = "longrope", "dynamic"


def frequencies_by_length(skeleton: nn.Module) -> float:
    """Give every such rotary embedding of ``skeleton`` a forward pass without state.

    Returns by how much the longest text exceeds the configuration's: ``dynamic`` is there to go beyond it.
    """
    longer = 1.0
    for module in skeleton.modules():
        kinds = _kinds(module)
        if any(_depends(kind) for kind in kinds.values()):
            module.forward = MethodType(_forward(unwrap(type(module).forward), _long_tables(module, kinds)), module)
            factors = [_parameters(module, name).get("factor") for name, kind in kinds.items() if _FORMULA in kind]
            longer = max([longer, *(float(factor) for factor in factors if factor)])
    return longer


def _kinds(module: nn.Module) -> dict[str | None, str]:
    """Type of layer, None where all are alike → its type of RoPE; empty for another module."""
    found = getattr(module, "rope_type", None)
    if isinstance(found, dict):
        return {name: kind for name, kind in found.items() if isinstance(kind, str)}
    return {None: found} if isinstance(found, str) and hasattr(module, "config") else {}


def _depends(kind: str) -> bool:
    return kind == _TABLES or _FORMULA in kind


def _parameters(module: Any, layer_type: str | None) -> dict[str, Any]:
    parameters: dict[str, Any] = module.config.rope_parameters
    return parameters if layer_type is None else parameters[layer_type]


def _long_tables(module: Any, kinds: dict[str | None, str]) -> dict[str | None, list[float]]:
    """Type of layer → the inverse frequencies of a text beyond the original length, for those that have a table."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    found = {}
    for name, kind in kinds.items():
        if kind == _TABLES:
            limit = int(_parameters(module, name)["original_max_position_embeddings"])
            found[name] = ROPE_INIT_FUNCTIONS[kind](module.config, torch.device("cpu"), limit + 1, name)[0].tolist()
    return found


def _forward(plain: Callable, tables: dict[str | None, list[float]]) -> Callable:
    """The forward pass that transformers wraps (``dynamic_rope_update``), with the buffer of the moment."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    def forward(self: Any, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> object:
        given = {} if layer_type is None else {"layer_type": layer_type}
        kind = _kinds(self).get(layer_type, "")
        if not _depends(kind):
            return plain(self, x, position_ids, **given)
        prefix = "" if layer_type is None else f"{layer_type}_"
        length = torch.ops.mxfx.length(position_ids)
        if kind == _TABLES:
            limit = int(_parameters(self, layer_type)["original_max_position_embeddings"])
            beyond = torch.tensor(tables[layer_type], dtype=torch.float32, device=x.device)
        else:
            limit = int(self.original_max_seq_len)
            beyond, _ = ROPE_INIT_FUNCTIONS[kind](self.config, x.device, length, layer_type)
        frequencies = torch.where(length > limit, beyond, getattr(self, f"{prefix}original_inv_freq"))
        with _in_place_of(self, f"{prefix}inv_freq", frequencies):
            return plain(self, x, position_ids, **given)

    return forward


@contextmanager
def _in_place_of(module: nn.Module, name: str, tensor: Tensor) -> Iterator[None]:
    """``tensor`` for a buffer, by the name under which the forward pass reads it."""
    kept = module._buffers[name]
    module._buffers[name] = tensor
    try:
        yield
    finally:
        module._buffers[name] = kept
