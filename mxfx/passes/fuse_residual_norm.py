"""``fuse-residual-norm``: a residual's sum and the norm that reads it, as one op."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

from torch import fx
from torch.ops import aten

from mxfx.ops.catalogue import arguments_of, spec
from mxfx.ops.kernels import packed
from mxfx.rewrite import ALL, Context, Exact, Numerics, Pass, Rewriter, Selector, register
from mxfx.rewrite.facts import LOWERED, Fact


@register
@dataclass(frozen=True)
class FuseResidualNorm(Pass):
    """Let the op that normalizes the residual stream also add to it what the block before gave.

    Before::

        %r = mxfx_kernels.silu_mul_quantize_linear([@down.codes], …, %x, "mxint4@32", …)       # or add(%x, %y)
        %q = mxfx_kernels.norm_quantize_linear([@q.codes, …], …, None, "mxint4@32", %r, @g, …)

    After::

        %y = mxfx_kernels.silu_mul_quantize_linear([@down.codes], …, None, "mxint4@32", …)
        %s = mxfx_kernels.add_norm_quantize_linear([@q.codes, …], …, %y, "mxint4@32", %x, @g, …)
        %r = %s[0]; %q = %s[1]

    A sum of many rows is read by its norm at once, and once less from memory; of few rows it costs no launch. It is
    rounded to the model's dtype before the norm reads it, as it was. A norm stays as it is, with the reason, whose
    input is no sum of two tensors alike, or where the sum is read before. Run it after `fuse-quant-linear`.
    """

    name: ClassVar[str] = "fuse-residual-norm"
    requires: ClassVar[frozenset[Fact]] = frozenset({LOWERED})
    numerics: ClassVar[Numerics] = Exact()
    select: Selector = ALL

    def run(self, rw: Rewriter, ctx: Context) -> None:
        for node in rw.program.nodes():
            if node.target is not packed.NORM_LINEAR or not self.select(node):
                continue
            total = spec(node).node_of("x")
            assert total is not None
            summands = _summands(total)
            earlier = [user for user in total.users if user < node]
            if isinstance(summands, str):
                rw.skip(node, summands)
            elif spec(node).get("residual") is not None:
                rw.skip(node, "its linears add a residual of their own")
            elif earlier:
                rw.skip(node, f"{earlier[0].name} reads the sum before it")
            elif rw.match(node, note=total.name):
                _fuse(rw, node, total, *summands)


def _summands(total: fx.Node) -> tuple[fx.Node, fx.Node | None] | str:
    """What is added to what, None for what `total` itself gives without its residual; else, as text, why nothing is."""
    added = spec(total).node_of("residual") if total.target in packed.MULTIPLYING.values() else None
    if added is not None:
        return added, None
    first, second = (spec(total).node_of(n) for n in ("self", "other")) if _is_plain_sum(total) else (None, None)
    if first is None or second is None:
        return "its input is no sum of two tensors"
    vals = [part.meta["val"] for part in (total, first, second)]
    if any(val.shape != vals[0].shape or val.dtype != vals[0].dtype for val in vals):
        return "its input is a sum of unlike tensors"
    return first, second


def _is_plain_sum(node: fx.Node) -> bool:
    return node.target is aten.add.Tensor and spec(node).get("alpha") == 1


def _fuse(rw: Rewriter, node: fx.Node, total: fx.Node, x: fx.Node, branch: fx.Node | None) -> None:
    val = total.meta["val"]
    if branch is None:
        branch = rw.call(total.target, *total.args, like=total, before=total, val=val, **total.kwargs)
        spec(branch).set(rw, "residual", None)
    vals = (val, node.meta["val"])
    given = dict(zip(arguments_of(node.target), node.args, strict=False)) | {"residual": branch, "x": x}
    new = rw.call(packed.ADD_NORM_LINEAR, *given.values(), like=node, before=node, val=vals, **node.kwargs)
    for at, (old, val) in enumerate(zip((total, node), vals, strict=True)):
        rw.replace(old, rw.call(operator.getitem, new, at, like=old, before=node, val=val))
