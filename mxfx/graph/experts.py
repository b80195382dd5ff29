"""Experts at trace time: transformers' experts interface, spelled in ``mxfx::expert_linear``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, fx, nn

from mxfx.graph.errors import TraceError
from mxfx.graph.fake import runner_of
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
        if node.target is aten.matmul.default and _is_by_head(node.args[0]):
            node = _expert_linear_on_the_left(program, node)
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


def _is_by_head(operand: object) -> bool:
    """Whether an operand is ``W[:, None]`` of a stored weight ``(heads, out, in)``."""
    unsqueezed = isinstance(operand, fx.Node) and operand.target is aten.unsqueeze.default
    return unsqueezed and operand.args[1] == 1 and _is_stack(operand.args[0])


def _expert_linear(program: Program, product: fx.Node) -> fx.Node:
    """``bmm(x, w)`` for ``x`` of ``(experts, rows, in)``: an expert linear whose slice ``e`` chooses expert ``e``.

    ``w`` is a stored weight ``(experts, in, out)``, or the turned view of one ``(experts, out, in)``.
    """
    x, weight = product.args
    assert isinstance(x, fx.Node) and isinstance(weight, fx.Node)
    stored = weight.args[0] if _is_turned(weight) else _store_transposed(program, weight, product)
    made = _each_its_own(_Before(product), x, stored)
    _replace(product, made, weight)
    return made


def _expert_linear_on_the_left(program: Program, product: fx.Node) -> fx.Node:
    """``matmul(W[:, None], x)`` for ``x`` of ``(heads, batch, in, seq)``: each head is an expert of its own rows."""
    weight, x = product.args
    assert isinstance(x, fx.Node) and isinstance(weight, fx.Node)
    call, stack = _Before(product), weight.args[0]
    assert isinstance(stack, fx.Node)
    heads, out, width = stack.meta["val"].shape
    rows = call(aten.reshape.default, call(aten.transpose.int, x, -2, -1), [heads, -1, width])
    made = _each_its_own(call, rows, stack)
    shape = [heads, call(aten.sym_size.int, x, 1), call(aten.sym_size.int, x, 3), out]
    _replace(product, call(aten.transpose.int, call(aten.reshape.default, made, shape), -2, -1), weight)
    return made


class _Before:
    """Makes calls before a node, on its behalf."""

    def __init__(self, node: fx.Node) -> None:
        self._node = node
        self._runner = runner_of(node.meta["val"].fake_mode)

    def __call__(self, target: Callable, *args: object) -> fx.Node:
        with self._node.graph.inserting_before(self._node):
            made = self._node.graph.call_function(target, args)
        made.meta = {"val": self._runner.run(made)}
        set_info(made, info(self._node))
        return made


def _each_its_own(call: _Before, x: fx.Node, stack: object) -> fx.Node:
    """The expert linear of ``(experts, rows, in)`` whose slice ``e`` chooses expert ``e``."""
    experts = x.meta["val"].shape[0]
    numbers = call(aten.unsqueeze.default, call(torch.ops.mxfx.arange.default, x, 0, experts), 1)
    chosen = call(aten.expand.default, numbers, [experts, call(aten.sym_size.int, x, 1)])
    return call(torch.ops.mxfx.expert_linear.default, x, stack, chosen)


def _replace(product: fx.Node, made: fx.Node, weight: fx.Node) -> None:
    product.replace_all_uses_with(made)
    for stale in (product, weight):
        if not stale.users:
            product.graph.erase_node(stale)


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
