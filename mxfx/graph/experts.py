"""Experts at trace time: transformers' experts interface, spelled in ``mxfx::expert_linear``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, fx, nn

from mxfx.graph.errors import TraceError
from mxfx.graph.node import info, set_info
from mxfx.graph.program import Program

#: A stored weight whose name ends so is the transposed view of the model's weight of the name before it.
TRANSPOSED = ".mT"

_TRANSPOSES = (torch.ops.aten.transpose.int, torch.ops.aten.mT.default)


def experts_forward(
    module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *unused: object
) -> Tensor:
    """An implementation for ``transformers.integrations.moe.ExpertsInterface``, for every layout that it has.

    ``hidden_states`` is ``(tokens, hidden)``; ``top_k_index`` and ``top_k_weights`` are ``(tokens, chosen)``. The
    module itself says how its gate works; what it says is traced.

    Raises ``TraceError`` for a part of a model: under expert parallelism a module holds some of its experts.
    """
    if getattr(module, "_is_expert_parallel", False):
        raise TraceError(
            f"{type(module).__name__} holds a part of its experts (expert parallelism); trace the whole model"
        )
    entrance = "gate_up_proj" if module.has_gate else "up_proj"
    inner = _linear(module, entrance, hidden_states, top_k_index)
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    outer = _linear(module, "down_proj", inner, top_k_index)
    if module.has_post_expert_norm:
        outer = module.post_expert_norm(outer)
    weighted: Tensor = outer * top_k_weights.unsqueeze(-1)
    return weighted.sum(dim=-2).to(hidden_states.dtype)


def _linear(module: nn.Module, name: str, x: Tensor, experts: Tensor) -> Tensor:
    weight = getattr(module, name)
    bias = getattr(module, f"{name}_bias") if module.has_bias else None
    if module.is_transposed:
        weight = weight.transpose(1, 2)
    result: Tensor = torch.ops.mxfx.expert_linear(x, weight, experts, bias)
    return result


def settle_experts(program: Program) -> None:
    """In a fresh trace: each expert linear is called after its weight, and stored weights have their input axis last.

    A weight that the model keeps as ``(experts, in, out)`` is stored as a view of it under a name that says so.
    """
    for node in program.nodes("expert_linear"):
        source = node.args[1]
        if isinstance(source, fx.Node) and source.target in _TRANSPOSES:
            source = _store_transposed(program, node, source)
        if isinstance(source, fx.Node) and source.op == "get_attr":
            set_info(node, replace(info(node), path=str(source.target).removesuffix(TRANSPOSED)))


def _store_transposed(program: Program, node: fx.Node, view: fx.Node) -> fx.Node:
    weight = view.args[0]
    if (
        not isinstance(weight, fx.Node)
        or weight.op != "get_attr"
        or view.args[1:] not in ((1, 2), (2, 1), (-1, -2), ())
    ):
        return view
    name = f"{weight.target}{TRANSPOSED}"
    if name not in program.weights:
        program.weights.add_transposed(str(weight.target), name)
    with program.graph.inserting_before(view):
        stored = program.graph.create_node("get_attr", name, name=name.replace(".", "_"))
    stored.meta = {"val": view.meta["val"]}
    set_info(stored, info(weight))
    node.update_arg(1, stored)
    for stale in (view, weight):
        if not stale.users:
            program.graph.erase_node(stale)
    return stored


def find_weight(tensors: Mapping[str, Tensor], name: str) -> Tensor | None:
    """The tensor of a model that a store keeps under ``name``; None if the model has none."""
    if name in tensors or not name.endswith(TRANSPOSED):
        return tensors.get(name)
    whole = tensors.get(name.removesuffix(TRANSPOSED))
    return None if whole is None else whole.mT
