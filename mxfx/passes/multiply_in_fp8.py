"""``multiply-in-fp8``: products of MX operands on FP8 tensor cores, exactly."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import fx
from torch.ops import aten

from mxfx.formats import parse
from mxfx.ops import fp8
from mxfx.ops.kernels import packed
from mxfx.ops.kernels.ways import no_fp8, summed
from mxfx.rewrite import ALL, Context, Local, Numerics, Pass, Rewriter, Selector, register
from mxfx.rewrite.facts import LOWERED, Fact
from mxfx.rewrite.operands import rounded_format


@register
@dataclass(frozen=True)
class MultiplyInFp8(Pass):
    """Give linears whose input and weight are both in few bits to FP8 tensor cores; those that share an input, at once.

    Before::

        %x4 = mxfx_kernels.norm_quantize(%x, …, "mxint4@32", …)
        %g  = mxfx_kernels.mx_linear(%x4, @gate.codes, @gate.scales, None, "mxint4@32")
        %u  = mxfx_kernels.mx_linear(%x4, @up.codes, @up.scales, None, "mxint4@32")

    After::

        %p  = mxfx_kernels.norm_quantize_e4m3(%x, …, "mxint4@32", …)      # E4M3 bytes and a power of two a row
        %gu = mxfx_kernels.mx_linear_e4m3(%p[0], %p[1], [@gate.codes, @up.codes], [@gate.scales, @up.scales], [], …)
        %g  = slice(%gu, -1, 0, 8192); %u = slice(%gu, -1, 8192, 16384)

    The exponents of a row's blocks fold into E4M3 numbers, of which the tensor cores take exact products. Their sums
    keep some 14 bits of the largest product: `sums` says what is done about it, and the op carries it.

    sums: "exact": an instruction sums 32 products, which have one exponent, and float32 adds what instructions give
        (Hopper; elsewhere the product is one in the model's dtype). Where a block is no multiple of 32 long, or formats
        are so wide that 14 bits do not hold a sum, the product is one in the model's dtype too, and the match says so.
        "fast": cuBLAS's, with sums in float32 every 128 products: 1.4 to 1.6 times as fast on an H200 (tools/bench),
        and of rows whose blocks span several octaves some results differ by more than their last bit.

    A linear stays as it is, with the reason, where its input is not rounded right before it, where a format has more
    than 4 significant bits or blocks of more octaves than E4M3 has (MXFP8), where a row of the weight spans more than
    it has, or where sizes are not multiples of 16. Rows of activations that span too many are counted as they come, and
    a run warns of them.
    """

    name: ClassVar[str] = "multiply-in-fp8"
    requires: ClassVar[frozenset[Fact]] = frozenset({LOWERED})
    numerics: ClassVar[Numerics] = Local(1e-2)
    sums: Literal["exact", "fast"] = "exact"
    select: Selector = ALL

    def run(self, rw: Rewriter, ctx: Context) -> None:
        groups: dict[tuple, list[fx.Node]] = {}
        for node in rw.program.nodes():
            if node.target is not packed.LINEAR or not self.select(node):
                continue
            reason = _why_not(rw, node)
            if reason is not None:
                rw.skip(node, reason)
                continue
            x, _, _, bias, text = node.args
            of_x, note = rounded_format(x), str(text)
            assert of_x is not None
            sums = summed(self.sums, parse(note), of_x)
            if sums == "wide":
                note += f" in the model's dtype: FP8 does not sum it exactly with {of_x}"
            if rw.match(node, note=note):
                groups.setdefault((x, text, bias is None, sums), []).append(node)
        rows: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
        for (x, *_, sums), linears in groups.items():
            if x not in rows:
                rows[x] = _rows_of(rw, x, linears[0])
            _together(rw, rows[x], linears, {} if sums == "exact" else {"sums": sums})
        for x in rows:
            _round_to_rows(rw, x)


def _why_not(rw: Rewriter, node: fx.Node) -> str | None:
    """Why a linear does not run in FP8; None if it does."""
    x, codes, scales, _, text = node.args
    fmt, width, channels = parse(str(text)), x.meta["val"].shape[-1], codes.meta["val"].shape[0]
    if (reason := no_fp8(fmt, rounded_format(x), width, channels)) is not None:
        return reason
    bytes_, powers = (rw.weights[str(part.target)] for part in (codes, scales))
    if bytes_.device.type == "meta":
        return "its weight has no data (meta device)"
    beyond = fp8.octaves_beyond(bytes_, powers, fmt, width)
    return f"{beyond} of {channels} rows of its weight span more octaves than E4M3 has" if beyond else None


def _rows_of(rw: Rewriter, x: fx.Node, first: fx.Node) -> tuple[fx.Node, fx.Node]:
    rows = rw.call(packed.E4M3_ROWS, x, like=x, before=first)
    payload, factors = (rw.call(operator.getitem, rows, i, like=x, before=first) for i in (0, 1))
    return payload, factors


def _round_to_rows(rw: Rewriter, x: fx.Node) -> None:
    """Let a quantizer that no one else reads give rows of E4M3 itself."""
    readers = [user for user in x.users if user.users]
    if len(readers) == 1 and readers[0].target is packed.E4M3_ROWS and x.target in packed.ROUNDING:
        rows = readers[0]
        rw.replace(
            rows, rw.call(packed.ROUNDING[x.target], *x.args, like=x, before=rows, val=rows.meta["val"], **x.kwargs)
        )


def _together(rw: Rewriter, rows: tuple[fx.Node, fx.Node], linears: list[fx.Node], how: dict[str, str]) -> None:
    first, val = linears[0], linears[0].meta["val"]
    payload, factors = rows
    codes, scales, biases = (
        [rw.weight(str(linear.args[at].target), first, first) for linear in linears if linear.args[at] is not None]
        for at in (1, 2, 3)
    )
    out = rw.call(
        packed.LINEAR_E4M3,
        *(payload, factors, codes, scales, biases, first.args[4], val.dtype),
        like=first,
        before=first,
        **how,
    )
    for linear, (start, end) in zip(linears, _spans(linears), strict=True):
        one = len(linears) == 1
        rw.replace(linear, out if one else rw.call(aten.slice.Tensor, out, -1, start, end, like=linear, before=linear))


def _spans(linears: list[fx.Node]) -> Iterator[tuple[int, int]]:
    """Where the results of each lie, side by side."""
    start = 0
    for linear in linears:
        end = start + int(linear.meta["val"].shape[-1])
        yield start, end
        start = end
