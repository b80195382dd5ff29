"""``fuse-quant-linear``: a quantizer, the linears that read it, and the residual that is added to them, as one op."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

from torch import fx
from torch.ops import aten

from mxfx.ops.catalogue import spec
from mxfx.ops.kernels import packed
from mxfx.rewrite import ALL, Context, Local, Numerics, Pass, Rewriter, Selector, register
from mxfx.rewrite.facts import LOWERED, Fact


@register
@dataclass(frozen=True)
class FuseQuantLinear(Pass):
    """Let one op round an input and multiply it, so that it chooses for both by how many rows there are.

    Before::

        %p = mxfx_kernels.norm_quantize_e4m3(%x, …, "mxint4@32", …)
        %y = mxfx_kernels.mx_linear_e4m3(%p[0], %p[1], [@o.codes], [@o.scales], [], "mxint4@32", bf16)
        %r = add(%x, %y)

    After::

        %r = mxfx_kernels.norm_quantize_linear([@o.codes], [@o.scales], [], %x, "mxint4@32", %x, …, "mxint4@32", …)

    Many rows run as before. Few rows, a step of decoding, take two kernels: one rounds them to integers and a power of
    two a block, one multiplies these with the packed codes in integer arithmetic and adds the residual. A quantizer
    that linears of several formats read stays apart, with the reason. Run it after `multiply-in-fp8`.
    """

    name: ClassVar[str] = "fuse-quant-linear"
    requires: ClassVar[frozenset[Fact]] = frozenset({LOWERED})
    numerics: ClassVar[Numerics] = Local(1e-2)
    select: Selector = ALL

    def run(self, rw: Rewriter, ctx: Context) -> None:
        for node in rw.program.nodes():
            if node.target is not packed.LINEAR_E4M3 or not self.select(node):
                continue
            found = _rows_of(node)
            if isinstance(found, str):
                rw.skip(node, found)
            elif rw.match(node, note=str(spec(node).get("format"))):
                _fuse(rw, node, found)


def _rows_of(node: fx.Node) -> fx.Node | str:
    """The quantizer that rounds a product's input for it alone; else, as text, why there is none."""
    parts = [spec(node).node_of(name) for name in ("payload", "row_scales")]
    (rows,) = parts[0].all_input_nodes
    if rows.target not in packed.MULTIPLYING:
        return "its input is not rounded for it alone"
    others = [u for u in rows.users if u not in parts and u.users] + [
        u for p in parts for u in p.users if u is not node
    ]
    assert all(p.target is operator.getitem for p in parts)
    return f"{others[0].name} reads the same rounded input" if others else rows


def _residual(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The sum that alone reads a product, and what it adds."""
    readers = list(node.users)
    if len(readers) != 1 or readers[0].target is not aten.add.Tensor or readers[0].kwargs:
        return None
    (total,) = readers
    others = [operand for operand in total.args if operand is not node]
    if len(others) != 1 or not isinstance(others[0], fx.Node):
        return None
    val, mine = others[0].meta["val"], node.meta["val"]
    same = getattr(val, "shape", None) == mine.shape and val.dtype == mine.dtype
    return (total, others[0]) if same else None


def _fuse(rw: Rewriter, node: fx.Node, rows: fx.Node) -> None:
    codes, scales, biases, text = (spec(node).get(name) for name in ("codes", "scales", "biases", "format"))
    residual = _residual(node)
    last, added = (node, None) if residual is None else residual
    new = rw.call(
        packed.MULTIPLYING[rows.target],
        *(codes, scales, biases, added, text, *rows.args),
        like=node,
        before=last,
        val=node.meta["val"],
        **rows.kwargs,
        **node.kwargs,
    )
    rw.replace(last, new)
