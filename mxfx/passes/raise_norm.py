"""``raise-norm``: RMSNorm and LayerNorm as one node each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import ClassVar

import torch
from torch import fx
from torch.ops import aten

from mxfx.graph.node import op_name, operands
from mxfx.graph.program import Program
from mxfx.ops.catalogue import spec
from mxfx.rewrite import Context, Exact, Numerics, Pass, Rewriter, register
from mxfx.rewrite.facts import NORMS_RAISED, Fact, Selected
from mxfx.rewrite.pattern import Failed, Found, Op, Var, is_node, is_number, is_weight, match


@register
@dataclass(frozen=True)
class RaiseNorm(Pass):
    """Turn each RMSNorm (arXiv 1910.07467) and LayerNorm (arXiv 1607.06450) into one node, found by dataflow.

    Before::

        %w = cast(%x, "compute")
        %r = rsqrt(mean(pow(%w, 2), [-1], True) + eps)
        %y = mul(@gain, cast(%w * %r, "model"))

    After::

        %y = mxfx.rms_norm(%x, @gain, eps)

    The gain may also be applied before the cast (OLMo 2), with an offset (Gemma), or be absent, and the root be a power
    of -0.5. ATen's layer norm over the last axis, and one that is spelled out (Cohere), become
    ``mxfx.layer_norm(%x, @gain, @bias, eps)``.
    """

    name: ClassVar[str] = "raise-norm"
    provides: ClassVar[frozenset[Fact]] = frozenset({NORMS_RAISED})
    numerics: ClassVar[Numerics] = Exact()
    required: ClassVar[bool] = True

    def run(self, rw: Rewriter, ctx: Context) -> None:
        for root in rw.program.nodes():
            if root.target is aten.layer_norm.default:
                _raise_native(rw, root)
            if not _is_rsqrt(root):
                continue
            found = _best(root)
            if isinstance(found, Failed):
                rw.skip(root, f"no RMSNorm or LayerNorm: {found.reason}", depth=found.depth)
                continue
            end, (target, *args) = found
            if rw.match(end):
                rw.replace(end, rw.call(target, *args, like=end))


@cache
def _forms() -> tuple[tuple[Op, Callable[[Mapping[str, object]], tuple]], ...]:
    """The forms in use, most specific first, each with the call that it becomes."""
    x, gain = Var("x", is_node), Var("gain", is_weight)
    wide, wide_gain = _cast(x, "compute"), _cast(gain, "compute")
    centred = Op(aten.sub.Tensor, (wide, Op(aten.mean.dim, (wide, [-1], True))))
    standard = _by_its_root(centred, aten.rsqrt.default)
    offset_gain = Op(aten.add.Tensor, (wide_gain, Var("offset", is_number)), swap=True)
    before, behind = partial(_rms_norm, gain_first=True), partial(_rms_norm, gain_first=False)
    normals = [_by_its_root(wide, aten.rsqrt.default), _by_its_root(wide, aten.pow.Tensor_Scalar, -0.5)]
    narrow = [_cast(normal, "model") for normal in normals]
    gains = (offset_gain, gain, wide_gain)
    return (
        *((_times(gain, one), behind) for one in narrow),
        *((_cast(_times(first, normal), "model"), before) for normal in normals for first in gains),
        *((one, behind) for one in narrow),
        (_cast(_times(wide_gain, standard), "model"), _layer_norm),
        (_cast(standard, "model"), _layer_norm),
    )


def _by_its_root(x: Op, root: torch._ops.OpOverload, *power: float) -> Op:
    """``x * rsqrt(mean(x²) + eps)``; the root may be spelled as a power, which ATen computes alike."""
    mean = Op(aten.mean.dim, (Op(aten.pow.Tensor_Scalar, (x, 2)), [-1], True))
    return _times(x, Op(root, (Op(aten.add.Tensor, (mean, Var("eps", is_number))), *power)))


def _rms_norm(bound: Mapping[str, object], gain_first: bool) -> tuple:
    offset = float(bound.get("offset", 0.0))
    return torch.ops.mxfx.rms_norm.default, bound["x"], bound.get("gain"), bound["eps"], offset, gain_first


def _layer_norm(bound: Mapping[str, object]) -> tuple:
    return torch.ops.mxfx.layer_norm.default, bound["x"], bound.get("gain"), None, bound["eps"], 0.0, True


def _cast(x: Op | Var, role: str) -> Op:
    return Op(torch.ops.mxfx.cast.default, (x, role))


def _times(a: Op | Var, b: Op) -> Op:
    return Op(aten.mul.Tensor, (a, b), swap=True)


def _is_rsqrt(node: fx.Node) -> bool:
    power = spec(node).get("exponent") if node.target is aten.pow.Tensor_Scalar else None
    return node.target is aten.rsqrt.default or power == -0.5


def _best(root: fx.Node) -> tuple[fx.Node, tuple] | Failed:
    """The end of the largest form downstream of ``root`` and the call that it becomes; else the deepest failure."""
    deepest = Failed(-1, "nothing reads the reciprocal root")
    ends = _downstream(root, steps=4)
    for pattern, becomes in _forms():
        for end in ends:
            outcome = match(pattern, end)
            if isinstance(outcome, Found) and root in outcome.nodes:
                return end, becomes(outcome.bound)
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


def _raise_native(rw: Rewriter, node: fx.Node) -> None:
    """One call of ATen's layer norm; ``gain + offset``, where a model stores its gain so, becomes two operands."""
    x, axes, gain, bias, eps = list(operands(node).values())[:5]
    if not _is_over_last_axis(node):
        rw.skip(node, f"it normalizes over {len(axes)} axes together")
        return
    shifted = match(Op(aten.add.Tensor, (Var("gain", is_weight), Var("offset", is_number)), swap=True), gain)
    offset = 0.0
    if isinstance(shifted, Found) and not gain.kwargs:
        gain, offset = shifted.bound["gain"], float(shifted.bound["offset"])
    if rw.match(node):
        rw.replace(node, rw.call(torch.ops.mxfx.layer_norm.default, x, gain, bias, eps, offset, like=node))


def _is_over_last_axis(node: fx.Node) -> bool:
    return len(operands(node)["normalized_shape"]) == 1


@NORMS_RAISED.means
def norms_raised(program: Program, selected: Selected) -> str | None:
    """No reciprocal root is left that the pattern of a norm covers, and no layer norm of ATen's over the last axis."""
    for node in program.graph.nodes:
        if _is_rsqrt(node) and not isinstance(_best(node), Failed):
            return f"{node.name} still spells out an RMSNorm or LayerNorm"
        if node.target is aten.layer_norm.default and _is_over_last_axis(node):
            return f"{node.name} is ATen's layer norm still"
    return None
