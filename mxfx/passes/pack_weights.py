"""``pack-weights``: rounded weights as the bytes that they are, not as floats that happen to lie on a grid."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import fx

from mxfx.formats import Format
from mxfx.formats.stored import store
from mxfx.graph.node import info, kind, path_of
from mxfx.ops.catalogue import spec, weights_of
from mxfx.rewrite import ALL, Context, Exact, Numerics, Pass, Rewriter, Selector, register
from mxfx.rewrite.facts import LOWERED, RAISED, Fact
from mxfx.rewrite.operands import is_rounded, mark_rounded, readers_of, weight_format

_READERS = ("linear", "expert_linear", "embedding", "block_transform")
_PARTS = ("codes", "scales")


@register
@dataclass(frozen=True)
class PackWeights(Pass):
    """Keep each rounded weight as codes and shared scales: 4.25 bits of a 4-bit weight in blocks of 32.

    Before::

        %x4 = mxfx.fake_quantize(%x, "mxint4@32", -1)
        %y  = aten.linear(%x4, @up.weight)                                  # {weight: mxint4@32}, f32[out, in]

    After::

        %x4 = mxfx.fake_quantize(%x, "mxint4@32", -1)
        %y  = mxfx.mx_linear(%x4, @up.weight.codes, @up.weight.scales, None, "mxint4@32")

    Experts become ``mx_expert_linear``, an embedding ``mx_embedding``, the matrix of a transform what ``mx_decode``
    gives; a tied weight is packed once for all who read it. What is decoded has the bits of the weight that was
    packed, so the logits keep theirs. A weight that lies off its grid, or that someone reads unpacked, stays as it
    is, and the record says why.
    """

    name: ClassVar[str] = "pack-weights"
    requires: ClassVar[frozenset[Fact]] = frozenset({RAISED})
    forbids: ClassVar[frozenset[Fact]] = frozenset({LOWERED})
    numerics: ClassVar[Numerics] = Exact()
    select: Selector = ALL

    def run(self, rw: Rewriter, ctx: Context) -> None:
        done: set[str] = set()
        for node in rw.program.nodes(*_READERS):
            operand = _operand(node)
            if not self.select(node) or operand not in info(node).formats:
                continue
            source = weights_of(node).get(operand)
            if source is None:
                rw.skip(node, f"its {operand} is computed, not stored")
                continue
            name = rw.weights.canonical(str(source.target))
            if name not in done:
                done.add(name)
                self._pack(rw, ctx.device, node, name)

    def _pack(self, rw: Rewriter, device: torch.device, node: fx.Node, name: str) -> None:
        fmt = info(node).formats[_operand(node)].format
        readers = readers_of(rw.program, name)
        reason = _why_not(rw, readers, name, fmt)
        if reason is not None:
            rw.skip(node, reason)
            return
        tensor = rw.weights[name]
        # A weight that waits on the host is encoded where the work is done, and its codes come back; a program may be
        # emitted for a GPU where there is none.
        home, there = tensor.device, device.type != "cuda" or torch.cuda.is_available()
        tensor = tensor.to(device) if home.type == "cpu" and there else tensor
        stored = store(tensor.to(rw.weights.working) if tensor.dtype != torch.float64 else tensor, fmt)
        if stored is None:
            rw.skip(node, f"its {_operand(node)} does not lie on the grid of {fmt}, or has no packed form in it")
            return
        if not rw.match(node, note=f"{fmt}, {fmt.bits_per_element:g} bits"):
            return
        for part, codes in zip(_PARTS, stored, strict=True):
            rw.weights.add(f"{name}.{part}", codes.to(home), rw.pass_name)
        for reader in readers:
            _unpack_at(rw, reader, name, fmt)


def _operand(reader: fx.Node) -> str:
    """Which operand of a reader is packed."""
    return "matrix" if kind(reader) == "block_transform" else "weight"


def _why_not(rw: Rewriter, readers: list[fx.Node], name: str, fmt: Format) -> str | None:
    if rw.weights[name].device.type == "meta":
        return "its weight has no data (meta device)"
    for reader in readers:
        if weight_format(reader, name, rw.program) != fmt:
            return f"{path_of(reader) or reader.name} reads the same tensor, not as {fmt}"
        if not is_rounded(reader, _operand(reader)):
            return f"its {_operand(reader)} is not rounded to {fmt} yet"
        if kind(reader) == "embedding" and rw.program.dtype == torch.float64:
            return "an embedding is decoded in float32, and this program runs in float64"
    return None


def _unpack_at(rw: Rewriter, reader: fx.Node, name: str, fmt: Format) -> None:
    """Let a reader decode the packed weight itself."""
    call = spec(reader)
    codes, scales = (rw.weight(f"{name}.{part}", reader) for part in _PARTS)
    val = reader.meta["val"]
    if call.concept == "block_transform":
        width, annotation = rw.weights[name].shape[-1], info(reader).formats["matrix"]
        whole = rw.call(torch.ops.mxfx.mx_decode.default, codes, scales, str(fmt), width, like=reader)
        rw.set_info(whole, replace(info(whole), formats=MappingProxyType({"weight": annotation})))
        mark_rounded(rw, whole, "weight")
        matrix = rw.call(torch.ops.mxfx.cast.default, whole, "model", like=reader)
        rw.set_info(matrix, replace(info(matrix), formats=MappingProxyType({})))
        call.set(rw, "matrix", matrix)
        return
    if call.concept != "embedding":
        given = (call.get("input"), codes, scales)
        if call.concept == "linear":
            op, rest = torch.ops.mxfx.mx_linear.default, (call.get("bias"), str(fmt))
        else:
            op = torch.ops.mxfx.mx_expert_linear.default
            rest = (call.get("experts"), call.get("bias"), str(fmt))
        new = rw.call(op, *given, *rest, like=reader, val=val)
        rw.set_info(new, replace(info(new), notes=info(reader).notes))
        rw.replace(reader, new)
        return
    op, width = torch.ops.mxfx.mx_embedding.default, rw.weights[name].shape[-1]
    rows = rw.call(op, codes, scales, call.get("indices"), str(fmt), width, like=reader)
    new = rw.call(torch.ops.mxfx.cast.default, rows, "model", like=reader, val=val)
    formats = info(reader).formats
    rw.set_info(
        rows, replace(info(rows), notes=info(reader).notes, formats=MappingProxyType({"weight": formats["weight"]}))
    )
    rw.replace(reader, new)
    others = {operand: annotation for operand, annotation in formats.items() if operand != "weight"}
    rw.set_info(new, replace(info(new), formats=MappingProxyType(others)))
