"""Transforms at run time, multiplied into the weights that they stand before: for targets that know none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor, fx

from mxfx.algorithms.block_transform import apply_blocks
from mxfx.algorithms.hadamard import hadamard_matrix
from mxfx.export.errors import ExportError
from mxfx.graph.node import NodeInfo, info, kind, operands, path_of, set_info
from mxfx.graph.program import Program

_TRANSFORMS = ("hadamard", "block_transform")
_ATTENTION = ("attention", "cached_attention")
_ROUNDS = ("fake_quantize", "keep_first_quantize")


def baked(program: Program) -> Program:
    """``linear(x T, W)`` as ``linear(x, W Tᵀ)``, and queries and keys without transforms that cancel.

    The result computes the same real function; its transformed weights lie on no grid any more, and neither activations
    nor the cache are rounded: their formats belong to the other basis. Weights are multiplied in float64.

    Raises ``ExportError`` for a transform that neither a linear's weight nor its partner takes in.
    """
    result = program.copy()
    for node in list(result.graph.nodes):
        if kind(node) in _ROUNDS:
            _skip(node)
    for attention in list(result.nodes(*_ATTENTION)):
        _cancel(result, attention)
        set_info(attention, _without_formats(attention))
    for node in list(result.nodes(*_TRANSFORMS)):
        _multiply_in(result, node)
    for node in result.graph.nodes:
        if any(operand != "weight" for operand in info(node).formats):
            set_info(node, _without_formats(node, keep=("weight",)))
    result.graph.eliminate_dead_code()
    return result


def transforms(program: Program) -> bool:
    """Whether there is a transform at run time, so that baking changes weights."""
    return any(True for _ in program.nodes(*_TRANSFORMS))


def left_out(program: Program) -> Iterator[str]:
    """Notes: what a program rounds as it runs and the baked one does not; that it has no transform."""
    if not transforms(program):
        yield "no transform runs at run time: --bake changed no weight"
    kept = [
        operand
        for node in program.graph.nodes
        for operand in info(node).formats
        if operand != "weight" and kind(node) not in _ROUNDS
    ]
    if kept:
        yield f"activations and cache are in full precision, {len(kept)} formats of them left out: --bake rounds none"


def _multiply_in(program: Program, node: fx.Node) -> None:
    strangers = [user for user in node.users if kind(user) != "linear" or user.args[0] is not node]
    if strangers:
        raise ExportError(f"a transform that {strangers[0].name} ({path_of(strangers[0])}) reads cannot be baked")
    matrix = _matrix(program, node)
    for linear in list(node.users):
        name = program.weight_of(linear)
        weight = program.weights[name].double()
        program.weights.set(name, apply_blocks(weight, matrix.mT.to(weight.device)), "bake")
        set_info(linear, _without_formats(linear))
    _skip(node)


def _cancel(program: Program, attention: fx.Node) -> None:
    given = operands(attention)
    q, k = given["q"], given["k"]
    if not (isinstance(q, fx.Node) and isinstance(k, fx.Node)):
        return
    if kind(q) not in _TRANSFORMS and kind(k) not in _TRANSFORMS:
        return
    if kind(q) not in _TRANSFORMS or kind(k) not in _TRANSFORMS:
        raise ExportError(f"{path_of(attention)} transforms queries or keys alone; that cannot be baked")
    product = _matrix(program, q) @ _matrix(program, k).mT
    unit = torch.eye(product.shape[-1], dtype=product.dtype)
    if not torch.allclose(product.cpu(), unit.expand(product.shape), atol=1e-2):
        raise ExportError(f"the transforms of queries and keys of {path_of(attention)} do not cancel")
    for node in (q, k):
        _skip(node)


def _matrix(program: Program, node: fx.Node) -> Tensor:
    if kind(node) == "hadamard":
        return hadamard_matrix(int(node.args[1]), torch.float64)
    source = node.args[1]
    assert isinstance(source, fx.Node)
    return program.tensor(source).double()


def _skip(node: fx.Node) -> None:
    node.replace_all_uses_with(node.args[0])
    node.graph.erase_node(node)


def _without_formats(node: fx.Node, keep: tuple[str, ...] = ()) -> NodeInfo:
    kept = {operand: annotation for operand, annotation in info(node).formats.items() if operand in keep}
    return replace(info(node), formats=MappingProxyType(kept))
