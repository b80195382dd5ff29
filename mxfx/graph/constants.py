"""Tensors that a forward pass writes down as numbers: kept through a trace without data, then put in the store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from mxfx.graph.node import NodeInfo, path_of, set_info
from mxfx.graph.program import NOMINAL_COMPUTE, NOMINAL_MODEL

aten = torch.ops.aten


@torch.library.custom_op("mxfx::literal", mutates_args=())
def _literal(values: Sequence[float], shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device).reshape(shape)


@_literal.register_fake
def _empty(values: Sequence[float], shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


class KeepLiterals(TorchFunctionMode):
    """Tensors made of plain numbers on the meta device, ``torch.tensor`` or ``x[[0, 2]]``, as calls that hold them.

    What is flipped is laid out plainly first.
    """

    def __torch_function__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor and torch.device(kwargs.get("device") or "cpu").type == "meta":
            found = _literal_of(args[0], kwargs.get("dtype"), kwargs["device"])
            return func(*args, **kwargs) if found is None else found
        if func is Tensor.__getitem__ and args[0].device.type == "meta":
            places = args[1] if isinstance(args[1], tuple) else (args[1],)
            alone = sum(not (place is None or place is ... or isinstance(place, slice)) for place in places) == 1
            args = (args[0], tuple(_place(place, args[0].device, alone) for place in places))
        if func in (Tensor.flip, torch.flip):
            # Of a view that overlaps itself (windows of ``unfold``) it asks which axis is longer: a guard on a length.
            args = (args[0].contiguous(), *args[1:])
        return func(*args, **kwargs)


def _place(place: object, device: torch.device, alone: bool) -> object:
    """A list of indices as a literal, or as a slice where it is a run and ``alone``; any other index as it is."""
    if not isinstance(place, list):
        return place
    if alone and _is_run(place):
        return slice(place[0], place[-1] + 1 or None)
    found = _literal_of(place, None, device)
    return place if found is None else found


def _is_run(place: list) -> bool:
    """Whether indices follow on each other, without going from the end of an axis to its start."""
    if not place or not all(type(i) is int for i in place):
        return False
    return place == list(range(place[0], place[0] + len(place))) and (place[0] >= 0 or place[-1] < 0)


def _literal_of(data: object, dtype: torch.dtype | None, device: torch.device | str) -> Tensor | None:
    flat, shape = _flat(data)
    if not all(type(value) in (bool, int, float) for value in flat):
        return None
    found: Tensor = torch.ops.mxfx.literal(
        [float(value) for value in flat], shape, dtype or _dtype(flat), torch.device(device)
    )
    return found


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
    """Read every literal from a weight instead; returns the weights, constants of compute precision, by name.

    A single number of compute precision stays in the graph.
    """
    found: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    for node in list(graph.nodes):
        if node.target is not torch.ops.mxfx.literal.default:
            continue
        values, shape, dtype, device = node.args
        if not shape and dtype == NOMINAL_COMPUTE:
            # A number stays one, so that whoever reads the graph sees it: what hides a score, for one.
            node.target, node.args = aten.scalar_tensor.default, tuple(values)
            node.kwargs = {"dtype": dtype, "device": device}
            continue
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
