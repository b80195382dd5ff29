"""``online-rotation``: rotate, quantize, rotate back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import ClassVar, Literal

import torch
from torch import fx

from mxfx.algorithms.hadamard import fitting_order, hadamard_matrix, order_words
from mxfx.graph.node import Annotation, info, kind, path_of
from mxfx.graph.program import Program
from mxfx.ops.catalogue import spec
from mxfx.rewrite import ALL, Close, Context, Numerics, Pass, Rewriter, Selector, register
from mxfx.rewrite.facts import ACTIVATIONS_QUANTIZED, ANNOTATED, KV_QUANTIZED, LOWERED, ROTATED_ONLINE, Fact, Selected


@register
@dataclass(frozen=True)
class OnlineRotation(Pass):
    """Let activations meet their format in a rotated basis and return from it; weights stay as they are.

    Before::

        %y = linear(%x, @W)  {input: mxint4@32}

    After::

        %h = mxfx.hadamard(%x, n)  {output: mxint4@32}
        %b = mxfx.block_transform(%h, @H⁻¹)
        %y = linear(%b, @W)

    ``insert-fake-quant`` then rounds %h. The rotation spreads large channels (QuaRot, arXiv 2404.00456), but the GEMM
    reads dense numbers: such a linear cannot run in 4 bits (``transform-inputs`` keeps it possible). ``sites`` chooses
    the inputs of linears, keys and values (``kv_cache``) or queries (``qk_matmul``) of what ``select`` matches;
    ``block`` is the order of H, 0 the whole axis; where
    it does not divide the axis, the largest order that divides both. Only operands that carry a format are rotated.

    sites: what is rotated: inputs of linears, keys and values, queries.
    block: order of the Hadamard matrix, or the largest that divides it and the axis; 0 for the whole axis.
    """

    name: ClassVar[str] = "online-rotation"
    requires: ClassVar[frozenset[Fact]] = frozenset({ANNOTATED})
    provides: ClassVar[frozenset[Fact]] = frozenset({ROTATED_ONLINE})
    forbids: ClassVar[frozenset[Fact]] = frozenset({ACTIVATIONS_QUANTIZED, KV_QUANTIZED, LOWERED})
    numerics: ClassVar[Numerics] = Close(1e-9)
    by_phase: ClassVar[bool] = True
    sites: tuple[Literal["linear", "kv_cache", "qk_matmul"], ...] = ("linear",)
    block: int = 0
    select: Selector = ALL

    def foresee(self, rw: Rewriter) -> int | None:
        return sum(len(list(fitting(rw, node, self.block, site))) for node, site in self._places(rw.program))

    def run(self, rw: Rewriter, ctx: Context) -> None:
        for node, site in self._places(rw.program):
            rotate_operands(rw, node, self.block, site)

    def _places(self, program: Program) -> list[tuple[fx.Node, str]]:
        selected = filter(self.select, program.nodes())
        return [(node, site) for node in selected for site in self.sites if site in sites_of(node)]


def sites_of(node: fx.Node) -> dict[str, tuple[str, ...]]:
    """The places where an online rotation of ``node`` could stand, and the operands that it would rotate there."""
    product = spec(node).product
    if product is not None:
        return {"linear": (product.left,)}
    return {"kv_cache": ("k", "v"), "qk_matmul": ("q",)} if kind(node) == "attention" else {}


def rotated_operands(node: fx.Node, site: str | None = None) -> tuple[str, ...]:
    """The operands that an online rotation at ``site`` (None: anywhere) would rotate: those that carry a format."""
    found = sites_of(node)
    operands = (o for name, own in found.items() if site in (None, name) for o in own)
    return tuple(operand for operand in operands if operand in info(node).formats)


def rotate_operands(rw: Rewriter, node: fx.Node, block: int, site: str | None = None) -> None:
    """Rotate, and rotate back, every annotated operand at a site; formats move to the rotated tensors."""
    for operand, source, order in fitting(rw, node, block, site):
        annotation = info(node).formats[operand]
        spec(node).set(rw, operand, _rotated_back(rw, source, order, annotation, node))
        rest = {o: a for o, a in info(node).formats.items() if o != operand}
        rw.set_info(node, replace(info(node), formats=MappingProxyType(rest)))


def fitting(rw: Rewriter, node: fx.Node, block: int, site: str | None = None) -> Iterator[tuple[str, fx.Node, int]]:
    """The operands that a rotation can stand at, what gives them, and the order that it gets; each is matched."""
    found = rotated_operands(node, site)
    if not found:
        rw.skip(node, "no operand to rotate carries a format")
    for operand in found:
        source = spec(node).node_of(operand)
        assert source is not None
        width = source.meta["val"].shape[-1]
        order = fitting_order(width, block)
        if order is None:
            rw.skip(node, f"{operand}: no Hadamard matrix of order {block or width} fits its {width} channels")
        elif rw.match(node, note=f"{operand}, order {order_words(width, block, order)}"):
            yield operand, source, order


def _rotated_back(rw: Rewriter, source: fx.Node, order: int, annotation: Annotation, reader: fx.Node) -> fx.Node:
    """``source`` rotated and rotated back; readers that want the same share the two nodes."""
    for user in source.users:
        rotated = info(user).formats.get("output")
        if (
            user.target is torch.ops.mxfx.hadamard.default
            and spec(user).get("block") == order
            and rotated is not None
            and rotated.format == annotation.format
        ):
            return next(iter(user.users))
    forward = rw.call(torch.ops.mxfx.hadamard.default, source, order, like=reader, after=source)
    rw.set_info(forward, info(forward).with_format("output", annotation))
    if order & (order - 1) == 0:
        # Sylvester's matrices are symmetric: each is its own inverse.
        return rw.call(torch.ops.mxfx.hadamard.default, forward, order, like=reader, after=forward)
    name = f"hadamard_inverse.{order}"
    if name not in rw.weights:
        rw.weights.add(name, hadamard_matrix(order, torch.float64).mT.contiguous(), rw.pass_name, constant=True)
    inverse = rw.weight(name, reader, before=source.next)
    return rw.call(torch.ops.mxfx.block_transform.default, forward, inverse, like=reader, after=forward)


@ROTATED_ONLINE.means
def rotated_online(program: Program, selected: Selected) -> str | None:
    for node in program.graph.nodes:
        for operand in rotated_operands(node):
            source = spec(node).node_of(operand)
            if source is not None and kind(source) in ("hadamard", "block_transform") and _is_return(source):
                return f"{operand} of {path_of(node)} is rotated back and still carries a format"
    return None


def _is_return(node: fx.Node) -> bool:
    before = spec(node).node_of("input")
    return before is not None and before.target is torch.ops.mxfx.hadamard.default and "output" in info(before).formats
