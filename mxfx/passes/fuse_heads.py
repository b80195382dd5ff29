"""``fuse-heads``: what makes queries, keys and values ready for an attention, as one op."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from mxfx.ops import cached_attend
from mxfx.ops.catalogue import arguments_of, spec
from mxfx.ops.kernels import heads
from mxfx.ops.kernels.library import NAMESPACE
from mxfx.rewrite import ALL, Context, Local, Numerics, Pass, Rewriter, Selector, register
from mxfx.rewrite.facts import LOWERED, Fact


@dataclass(frozen=True)
class _Head:
    """What lies behind an operand of an attention: its source, and what is done to it."""

    source: fx.Node
    angles: tuple[fx.Node, fx.Node] | None = None
    matrix: fx.Node | None = None
    format: str | None = None
    hadamard: bool = False


@register
@dataclass(frozen=True)
class FuseHeads(Pass):
    """Let one op rotate queries and keys by their positions, transform and round them, and values with them.

    Before::

        %q  = mxfx_kernels.block_transform(mxfx_kernels.rope(%xq, %cos, %sin), @tq)
        %k4 = mxfx_kernels.rope_quantize(%xk, %cos, %sin, @tk, "mxint4@32", False)
        %v4 = mxfx_kernels.fake_quantize(%xv, "mxint4@32", -1)
        %y  = runtime.cached_attend(%q, %k4, %v4, …)

    After::

        %h  = mxfx_kernels.ready_heads(%xq, %xk, %xv, %cos, %sin, [@tq, @tk, None], None, "mxint4@32", "mxint4@32", …)
        %y  = runtime.cached_attend(%h[0], %h[1], %h[2], …)

    Many tokens run the same kernels as before, few tokens, a step of decoding, one instead of four. An attention whose
    keys are not rotated, or whose values are not rounded, stays as it is, with the reason.
    """

    name: ClassVar[str] = "fuse-heads"
    requires: ClassVar[frozenset[Fact]] = frozenset({LOWERED})
    numerics: ClassVar[Numerics] = Local(1e-2)
    select: Selector = ALL

    def run(self, rw: Rewriter, ctx: Context) -> None:
        for node in rw.program.nodes():
            if node.target is not cached_attend or not self.select(node):
                continue
            given = [operand for name in ("q", "k", "v") if (operand := spec(node).node_of(name)) is not None]
            found = tuple(_behind(operand) for operand in given)
            # Not by places counted before: what an attention shares with an earlier one is new by now.
            last = max(given)
            reason = _why_not(found)
            if any(user < last for operand in given for user in operand.users):
                reason = reason or "another reads its queries, keys or values before the last of them is there"
            if reason is not None:
                rw.skip(node, reason)
            elif rw.match(node, note=str(found[1].format)):
                _fuse(rw, node, given, found, last)


def _behind(node: Any) -> _Head:
    """One or two kernels, the first of which only the second reads."""
    kernels = getattr(torch.ops, NAMESPACE)
    names = list(arguments_of(node.target)) if node.op == "call_function" else []
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    angles = (given.get("cos"), given.get("sin"))
    rest = (given.get("matrix"), given.get("format"), given.get("hadamard", False))
    if node.target is kernels.rope.default:
        return _Head(given["x"], angles)
    if node.target is kernels.rope_quantize.default:
        return _Head(given["x"], angles, *rest)
    if node.target is kernels.transform_quantize.default:
        return _Head(given["x"], None, *rest)
    if node.target is kernels.fake_quantize.default and given.get("axis", -1) in (-1, node.meta["val"].dim() - 1):
        return _Head(given["x"], None, *rest)
    if node.target is kernels.block_transform.default:
        source = given["x"]
        before = _behind(source) if len(source.users) == 1 else _Head(source)
        turned = before.matrix is None and before.format is None
        return _Head(before.source, before.angles, given["matrix"]) if turned else _Head(source, None, given["matrix"])
    return _Head(node)


def _why_not(found: tuple[_Head, ...]) -> str | None:
    q, k, v = found
    if q.angles is None or k.angles is None:
        return "a kernel of its own does not rotate its queries and keys"
    if q.angles != k.angles:
        return "its queries and keys are rotated by different angles"
    if v.format is None or v.angles is not None:
        return "its values are not rounded"
    return None


def _fuse(rw: Rewriter, node: fx.Node, given: list[fx.Node], found: tuple[_Head, ...], last: fx.Node) -> None:
    q, k, v = found
    assert q.angles is not None
    vals = tuple(operand.meta["val"] for operand in given)
    new = rw.call(
        heads.READY,
        *(q.source, k.source, v.source, *q.angles, [part.matrix for part in found]),
        *(q.format, k.format, v.format, q.hadamard, k.hadamard, v.hadamard),
        like=node,
        before=last,
        val=vals,
    )
    for at, (operand, val) in enumerate(zip(given, vals, strict=True)):
        rw.replace(operand, rw.call(operator.getitem, new, at, like=operand, before=last, val=val))
