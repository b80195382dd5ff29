"""``raise-norm``: RMSNorm as one node."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import fx
from torch.ops import aten

from mxfx.graph.node import op_name
from mxfx.graph.program import Program
from mxfx.rewrite import Context, Exact, Numerics, Pass, Rewriter, register
from mxfx.rewrite.facts import NORMS_RAISED, Fact, Selected
from mxfx.rewrite.pattern import Failed, Found, Op, Var, is_node, is_number, is_weight, match


@register
@dataclass(frozen=True)
class RaiseNorm(Pass):
    """Turn each RMSNorm (arXiv 1910.07467, eq. 4) into one node, found by dataflow.

    Before::

        %w = cast(%x, "compute")
        %r = rsqrt(mean(pow(%w, 2), [-1], True) + eps)
        %y = mul(@gain, cast(%w * %r, "model"))

    After::

        %y = mxfx.rms_norm(%x, @gain, eps)

    The gain may also be applied before the cast (OLMo 2), with an offset (Gemma), or be absent.
    """

    name: ClassVar[str] = "raise-norm"
    provides: ClassVar[frozenset[Fact]] = frozenset({NORMS_RAISED})
    numerics: ClassVar[Numerics] = Exact()
    required: ClassVar[bool] = True

    def run(self, rw: Rewriter, ctx: Context) -> None:
        for root in rw.program.nodes():
            if not _is_rsqrt(root):
                continue
            found = _best(root)
            if isinstance(found, Failed):
                rw.skip(root, f"no RMSNorm: {found.reason}", depth=found.depth)
                continue
            end, bound, gain_first = found
            if rw.match(end):
                _rewrite(rw, end, bound, gain_first)


@cache
def _forms() -> tuple[tuple[Op, bool], ...]:
    """The forms in use, most specific first, each with whether the gain is applied before the cast."""
    x, gain = Var("x", is_node), Var("gain", is_weight)
    wide, wide_gain = _cast(x, "compute"), _cast(gain, "compute")
    mean = Op(aten.mean.dim, (Op(aten.pow.Tensor_Scalar, (wide, 2)), [-1], True))
    normal = _times(wide, Op(aten.rsqrt.default, (Op(aten.add.Tensor, (mean, Var("eps", is_number))),)))
    narrow = _cast(normal, "model")
    offset_gain = Op(aten.add.Tensor, (wide_gain, Var("offset", is_number)), swap=True)
    return (
        (_times(gain, narrow), False),
        *((_cast(_times(first, normal), "model"), True) for first in (offset_gain, gain, wide_gain)),
        (narrow, False),
    )


def _cast(x: Op | Var, role: str) -> Op:
    return Op(torch.ops.mxfx.cast.default, (x, role))


def _times(a: Op | Var, b: Op) -> Op:
    return Op(aten.mul.Tensor, (a, b), swap=True)


def _is_rsqrt(node: fx.Node) -> bool:
    return node.target is aten.rsqrt.default


def _best(root: fx.Node) -> tuple[fx.Node, Found, bool] | Failed:
    """The largest form that ends downstream of ``root``; the deepest failure if none fits."""
    deepest = Failed(-1, "nothing reads the reciprocal root")
    ends = _downstream(root, steps=4)
    for pattern, gain_first in _forms():
        for end in ends:
            outcome = match(pattern, end)
            if isinstance(outcome, Found) and root in outcome.nodes:
                return end, outcome, gain_first
            if isinstance(outcome, Failed) and outcome.depth > deepest.depth:
                deepest = outcome
    return deepest


def _downstream(node: fx.Node, steps: int) -> list[fx.Node]:
    """The chain of single readers below ``node``, the farthest first."""
    reached = [node]
    frontier = [node]
    for _ in range(steps):
        frontier = [
            user for n in frontier for user in n.users if op_name(user) in ("aten.mul.Tensor", "mxfx.cast.default")
        ]
        reached.extend(frontier)
    return reached[::-1]


def _rewrite(rw: Rewriter, end: fx.Node, found: Found, gain_first: bool) -> None:
    bound = found.bound
    new = rw.call(
        torch.ops.mxfx.rms_norm.default,
        bound["x"],
        bound.get("gain"),
        bound["eps"],
        float(bound.get("offset", 0.0)),
        gain_first,
        like=end,
    )
    rw.replace(end, new)


@NORMS_RAISED.means
def norms_raised(program: Program, selected: Selected) -> str | None:
    """No reciprocal root is left that the pattern of an RMSNorm covers."""
    for node in program.graph.nodes:
        if _is_rsqrt(node) and not isinstance(_best(node), Failed):
            return f"{node.name} still spells out an RMSNorm"
    return None
