"""Tensors that a forward pass writes down as numbers: kept through a trace without data, then put in the store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from mxfx.graph.node import NodeInfo, path_of, set_info
from mxfx.graph.program import NOMINAL_COMPUTE, NOMINAL_MODEL


@torch.library.custom_op("mxfx::literal", mutates_args=())
def _literal(values: Sequence[float], shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device).reshape(shape)


@_literal.register_fake
def _empty(values: Sequence[float], shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


class KeepLiterals(TorchFunctionMode):
    """``torch.tensor`` of plain numbers on the meta device as a call that holds the numbers."""

    def __torch_function__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if func is not torch.tensor or device is None or torch.device(device).type != "meta":
            return func(*args, **kwargs)
        flat, shape = _flat(args[0])
        if not all(type(value) in (bool, int, float) for value in flat):
            return func(*args, **kwargs)
        dtype = kwargs.get("dtype") or _dtype(flat)
        return torch.ops.mxfx.literal([float(value) for value in flat], shape, dtype, torch.device(device))


def _flat(data: object) -> tuple[list, list[int]]:
    """Numbers in order, and the shape of nested lists; anything else as one entry."""
    if not isinstance(data, list | tuple):
        return [data], []
    parts = [_flat(item) for item in data]
    return [v for values, _ in parts for v in values], [len(parts), *(parts[0][1] if parts else [])]


def _dtype(flat: list) -> torch.dtype:
    if any(isinstance(value, float) for value in flat) or not flat:
        return torch.get_default_dtype()
    return torch.bool if all(isinstance(value, bool) for value in flat) else torch.int64


def store_literals(graph: fx.Graph) -> dict[str, Tensor]:
    """Read every literal from a weight instead; returns the weights, constants of compute precision, by name."""
    found: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    for node in list(graph.nodes):
        if node.target is not torch.ops.mxfx.literal.default:
            continue
        values, shape, dtype, _ = node.args
        # A literal in the model's dtype is kept exact and cast where it is read.
        stored = NOMINAL_COMPUTE if dtype == NOMINAL_MODEL else dtype
        name = names.setdefault(str((values, shape, stored)), f"constants.literal_{len(names)}")
        found[name] = torch.tensor(values, dtype=stored).reshape(shape)
        with graph.inserting_before(node):
            read = graph.create_node("get_attr", name)
            set_info(read, NodeInfo())
            with node.meta["val"].fake_mode:
                read.meta["val"] = torch.empty_like(node.meta["val"], dtype=stored)
            new = read
            if dtype == NOMINAL_MODEL:
                new = graph.call_function(torch.ops.mxfx.cast.default, (read, "model"))
                new.meta = dict(node.meta)
                set_info(new, NodeInfo(path=path_of(node)))
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    return found
