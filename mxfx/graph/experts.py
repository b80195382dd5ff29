"""Experts at trace time: transformers' experts interface, spelled in ``mxfx::expert_linear``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, fx, nn

from mxfx.graph.errors import TraceError
from mxfx.graph.fake import FakeRunner
from mxfx.graph.node import info, kind, set_info
from mxfx.graph.program import Program

aten = torch.ops.aten

#: A stored weight whose name ends so is the transposed view of the model's weight of the name before it.
TRANSPOSED = ".mT"

_TRANSPOSES = (aten.transpose.int, aten.mT.default)


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
    if getattr(module, "has_post_expert_norm", False):  # not in transformers 5.17
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

    A weight that the model keeps as ``(experts, in, out)`` is stored as a view of it under a name that says so. A
    batched product with a stored weight is an expert linear too: each expert reads rows of its own.
    """
    for node in list(program.nodes()):
        if node.target is aten.bmm.default and (_is_stack(node.args[1]) or _is_turned(node.args[1])):
            node = _expert_linear(program, node)
        if kind(node) != "expert_linear":
            continue
        source = node.args[1]
        if isinstance(source, fx.Node) and source.target in _TRANSPOSES and _is_stack(source.args[0]):
            node.update_arg(1, _store_transposed(program, source.args[0], node))
            for stale in (source, source.args[0]):
                if not stale.users:
                    program.graph.erase_node(stale)
        if isinstance(node.args[1], fx.Node) and node.args[1].op == "get_attr":
            set_info(node, replace(info(node), path=str(node.args[1].target).removesuffix(TRANSPOSED)))


def _is_stack(operand: object) -> bool:
    """Whether an operand is a stored weight ``(experts, …, …)``."""
    return isinstance(operand, fx.Node) and operand.op == "get_attr" and operand.meta["val"].dim() == 3


def _is_turned(operand: object) -> bool:
    """Whether an operand is a stored weight ``(experts, out, in)`` with its last two axes swapped."""
    if not isinstance(operand, fx.Node) or operand.target not in _TRANSPOSES or not _is_stack(operand.args[0]):
        return False
    return operand.target is aten.mT.default or {int(axis) % 3 for axis in operand.args[1:3]} == {1, 2}


def _expert_linear(program: Program, product: fx.Node) -> fx.Node:
    """``bmm(x, w)`` for ``x`` of ``(experts, rows, in)``: an expert linear whose slice ``e`` chooses expert ``e``.

    ``w`` is a stored weight ``(experts, in, out)``, or the turned view of one ``(experts, out, in)``.
    """
    x, weight = product.args
    assert isinstance(x, fx.Node) and isinstance(weight, fx.Node)
    runner = FakeRunner(weight.meta["val"].fake_mode)

    def call(target: Callable, *args: object) -> fx.Node:
        with program.graph.inserting_before(product):
            node = program.graph.call_function(target, args)
        node.meta = {"val": runner.run(node)}
        set_info(node, info(product))
        return node

    experts = weight.meta["val"].shape[0]
    numbers = call(aten.unsqueeze.default, call(torch.ops.mxfx.arange.default, x, 0, experts), 1)
    chosen = call(aten.expand.default, numbers, [experts, call(aten.sym_size.int, x, 1)])
    stored = weight.args[0] if _is_turned(weight) else _store_transposed(program, weight, product)
    made = call(torch.ops.mxfx.expert_linear.default, x, stored, chosen)
    product.replace_all_uses_with(made)
    for stale in (product, weight):
        if not stale.users:
            program.graph.erase_node(stale)
    return made


def _store_transposed(program: Program, weight: fx.Node, before: fx.Node) -> fx.Node:
    """A node that reads the transposed view of a stored weight."""
    name = f"{weight.target}{TRANSPOSED}"
    if name not in program.weights:
        program.weights.add_transposed(str(weight.target), name)
    with program.graph.inserting_before(before):
        stored = program.graph.create_node("get_attr", name, name=name.replace(".", "_"))
    val = weight.meta["val"]
    with val.fake_mode:
        stored.meta = {"val": val.mT}
    set_info(stored, info(weight))
    return stored


def find_weight(tensors: Mapping[str, Tensor], name: str) -> Tensor | None:
    """The tensor of a model that a store keeps under ``name``; None if the model has none."""
    if name in tensors or not name.endswith(TRANSPOSED):
        return tensors.get(name)
    whole = tensors.get(name.removesuffix(TRANSPOSED))
    return None if whole is None else whole.mT
