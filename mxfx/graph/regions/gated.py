"""Gated activations: the products in an MLP, and the linears that write and read them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, fx

import mxfx.ops  # noqa: F401  (registers the dialect)
from mxfx.graph.node import kind, op_name
from mxfx.graph.program import Program
from mxfx.graph.regions.features import exclusive, features, is_matrix
from mxfx.graph.regions.ops import UNARY, Refusal, place_of
from mxfx.graph.regions.residual import is_scalar, width_of
from mxfx.ops.catalogue import multiplies

aten = torch.ops.aten


@dataclass(frozen=True)
class Writer:
    """Output ``rows`` ``(width,)`` of a linear, in the order in which the region's axis lists them."""

    linear: fx.Node
    rows: Tensor


@dataclass(frozen=True)
class GatedRegion:
    """An axis of hidden channels between the linears that write it and those that read it.

    ``scaled`` enter the product linearly (``up``): a diagonal commutes. ``gates`` pass an elementwise function
    first (``silu(gate)``): only a permutation does. ``readers`` contract the axis (``down``).
    """

    product: fx.Node
    width: int
    scaled: tuple[Writer, ...]
    gates: tuple[Writer, ...]
    readers: tuple[fx.Node, ...]

    @cached_property
    def writers(self) -> tuple[Writer, ...]:
        return (*self.scaled, *self.gates)


def gated_regions(program: Program) -> Iterator[GatedRegion | Refusal]:
    """Every product or activation between linears, in graph order."""
    for node in program.graph.nodes:
        readers = [u for u in node.users if multiplies(u, node) and is_matrix(u)]
        if readers and (node.target in UNARY or node.target is aten.mul.Tensor):
            yield _gated(node, readers)


def _gated(product: fx.Node, readers: list[fx.Node]) -> GatedRegion | Refusal:
    strangers = [u for u in product.users if u not in readers]
    if strangers:
        return Refusal(product, f"{place_of(strangers[0])} reads {product.name} and is no linear")
    found = list(_writers(product, linear=True))
    refused = next((w for w in found if isinstance(w, Refusal)), None)
    if refused is not None:
        return refused
    scaled = tuple(w for w, linear in found if linear)  # type: ignore[misc]
    gates = tuple(w for w, linear in found if not linear)  # type: ignore[misc]
    return GatedRegion(product, width_of(product) or 0, scaled, gates, tuple(readers))


def _writers(node: fx.Node, linear: bool) -> Iterator[tuple[Writer, bool] | Refusal]:
    if node.target in UNARY:
        yield from _below(node, node.args[0], False)
    elif node.target is aten.mul.Tensor and not any(is_scalar(a) for a in node.args):
        for operand in node.args:
            yield from _below(node, operand, linear)
    else:
        yield Refusal(node, f"{op_name(node)} at {place_of(node)} is no elementwise function of linears")


def _below(user: fx.Node, operand: object, linear: bool) -> Iterator[tuple[Writer, bool] | Refusal]:
    assert isinstance(operand, fx.Node)
    if operand.target in UNARY or operand.target is aten.mul.Tensor:
        if len(operand.users) != 1:
            yield Refusal(operand, f"{operand.name} has {len(operand.users)} readers")
            return
        yield from _writers(operand, linear)
        return
    found = features(operand)
    if isinstance(found, Refusal):
        yield found
        return
    if kind(found.source) != "linear" or found.index.dim() != 1:
        yield Refusal(user, f"{operand.name} comes from {op_name(found.source)} at {place_of(found.source)}, no linear")
        return
    shared = exclusive(found, user)
    yield (Writer(found.source, found.index), linear) if shared is None else Refusal(user, shared)
