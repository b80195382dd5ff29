"""``unpack-weights``: packed weights as floats again, where numbers are multiplied faster than they are decoded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, fx
from torch.ops import aten

from mxfx.formats import parse
from mxfx.formats.stored import restore
from mxfx.graph.node import info, kind, operands
from mxfx.graph.program import Program
from mxfx.ops.catalogue import spec
from mxfx.ops.kernels.library import load_cpu
from mxfx.ops.kernels.structs import fits_byte, units_of
from mxfx.rewrite import ALL, Exact, NodePass, Numerics, Rewriter, Selector, register
from mxfx.rewrite.facts import LOWERED, Fact
from mxfx.rewrite.operands import readers_of

#: Ops that read packed weights.
PACKED = ("mx_linear", "mx_expert_linear", "mx_embedding", "mx_decode")
_CODES, _SCALES = ".codes", ".scales"


@register
@dataclass(frozen=True)
class UnpackWeights(NodePass):
    """Decode packed weights once, where a program is emitted, instead of in every call: ``pack-weights`` backwards.

    Before::

        %y = mxfx.mx_linear(%x4, @up.weight.codes, @up.weight.scales, None, "mxint4@32")

    After::

        %y = aten.linear(%x4, @up.weight)                                   # f32[out, in], on the grid of mxint4@32

    Every decoded number has the bits of the weight that was packed. The emit stage does so with the matrices of
    transforms (``mx_decode``), which kernels read whole, and for a CPU where no kernel of the machine multiplies codes:
    what is saved stays packed, what runs takes the memory of the model's dtype, and a third of the time.

    select: whose weights are unpacked.
    unserved: leave packed what a kernel of this machine multiplies as it is: linears of 4 bits whose input is rounded
        onto a grid of integers, and embeddings, of which it decodes the rows that are looked up.
    """

    name: ClassVar[str] = "unpack-weights"
    kinds: ClassVar[tuple[str, ...]] = PACKED
    forbids: ClassVar[frozenset[Fact]] = frozenset({LOWERED})
    numerics: ClassVar[Numerics] = Exact()
    select: Selector = ALL
    unserved: bool = False

    def refuse(self, rw: Rewriter, node: fx.Node) -> str | None:
        if rw.weights[_codes(node)].device.type == "meta":
            return "its weight has no data (meta device)"
        if kind(node) == "mx_decode" and not all(_is_model_cast(user) for user in node.users):
            return "it is read in float32, not in the model's dtype"
        return "its codes are read as they lie" if self.unserved and _served(rw.program, node) else None

    def note(self, node: fx.Node) -> str:
        return str(operands(node)["format"])

    def rewrite(self, rw: Rewriter, node: fx.Node) -> None:
        _unpack(rw, node, _codes(node).removesuffix(_CODES))


def _codes(node: fx.Node) -> str:
    return str(operands(node)["codes"].target)


def _served(program: Program, node: fx.Node) -> bool:
    """Whether codes of the weight meet codes of the input, few rows at a time, without being decoded; of an embedding,
    whether only the rows that are looked up are, since nobody else reads it as numbers.
    """
    if kind(node) == "mx_embedding":
        others = (one for one in readers_of(program, _codes(node)) if kind(one) != "mx_embedding")
        return all(_served(program, one) for one in others)
    given = operands(node)
    source = given.get("x") if kind(node) == "mx_linear" else None
    if not isinstance(source, fx.Node) or load_cpu() is not None or units_of(str(given["format"])) is None:
        return False
    rounded = spec(source).rounds
    return rounded is not None and rounded.axis == -1 and fits_byte(parse(rounded.format))


def packed_nodes(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that read packed weights."""
    return [node for node in graph.nodes if kind(node) in PACKED]


def _unpack(rw: Rewriter, node: fx.Node, name: str) -> None:
    given = operands(node)
    if name not in rw.weights:
        rw.weights.add(name, _floats(rw, name, node), rw.pass_name)
    weight = rw.weight(name, node)
    if kind(node) == "mx_decode":
        _give(rw, node, weight)
        return
    if "ids" in given:
        new = rw.call(aten.embedding.default, weight, given["ids"], like=node)
    elif "experts" in given:
        op = torch.ops.mxfx.expert_linear.default
        new = rw.call(op, given["x"], weight, given["experts"], given["bias"], like=node, val=node.meta["val"])
    else:
        new = rw.call(aten.linear.default, given["x"], weight, given["bias"], like=node, val=node.meta["val"])
    rw.set_info(new, replace(info(new), notes=info(node).notes))
    rw.replace(node, new)


def _is_model_cast(user: fx.Node) -> bool:
    return kind(user) == "cast" and operands(user)["role"] == "model"


def _give(rw: Rewriter, node: fx.Node, weight: fx.Node) -> None:
    """Let who reads all of a decoded tensor, in the model's dtype, read the weight instead."""
    for cast in list(node.users):
        rw.replace(cast, weight)


def _floats(rw: Rewriter, name: str, node: fx.Node) -> Tensor:
    given = operands(node)
    width, source = given.get("width"), given.get("x")
    if not isinstance(width, int):
        assert isinstance(source, fx.Node)
        width = int(source.meta["val"].shape[-1])
    codes, scales = rw.weights[name + _CODES], rw.weights[name + _SCALES]
    return restore(codes, scales, parse(str(given["format"])), width, torch.float32)
