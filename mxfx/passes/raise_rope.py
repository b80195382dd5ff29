"""``raise-rope``: rotary position embedding as one node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from mxfx.graph.program import Program
from mxfx.rewrite import Context, Exact, Numerics, Pass, Rewriter, register
from mxfx.rewrite.facts import ROPES_RAISED, Fact, Selected
from mxfx.rewrite.pattern import Failed, Found, Op, Var, is_node, is_number, match

aten = torch.ops.aten

_x = Var("x", is_node)
_end = Var("end", lambda a: isinstance(a, int) and a >= 1 << 62)
_low = Op(aten.slice.Tensor, (_x, 3, 0, Var("half", is_number)))
_high = Op(aten.slice.Tensor, (_x, 3, Var("half", is_number), _end))
_turned = Op(aten.cat.default, ([Op(aten.neg.default, (_high,)), _low], -1))
_cos = Op(aten.unsqueeze.default, (Var("cos", is_node), 1))
_sin = Op(aten.unsqueeze.default, (Var("sin", is_node), 1))


@register
@dataclass(frozen=True)
class RaiseRope(Pass):
    """Turn each rotary embedding in the half-split layout (arXiv 2104.09864, eq. 34) into one node.

    Before::

        %t = cat([neg(%x[..., half:]), %x[..., :half]], -1)
        %y = %x * unsqueeze(%cos, 1) + %t * unsqueeze(%sin, 1)

    After::

        %y = mxfx.rope(%x, %cos, %sin)
    """

    name: ClassVar[str] = "raise-rope"
    provides: ClassVar[frozenset[Fact]] = frozenset({ROPES_RAISED})
    numerics: ClassVar[Numerics] = Exact()
    required: ClassVar[bool] = True

    def run(self, rw: Rewriter, ctx: Context) -> None:
        for root in rw.program.nodes():
            if not _is_candidate(root):
                continue
            found = _match_rope(root)
            if isinstance(found, Failed):
                rw.skip(root, f"no rotary embedding: {found.reason}", depth=found.depth)
            elif rw.match(root):
                _rewrite(rw, root, found)


def _is_candidate(node: fx.Node) -> bool:
    """A sum of two products, one of them over a concatenation: what every spelling of RoPE ends in."""
    if node.target is not aten.add.Tensor:
        return False
    products = [a for a in node.args[:2] if isinstance(a, fx.Node) and a.target is aten.mul.Tensor]
    return len(products) == 2 and any(_has_cat(p) for p in products)


def _has_cat(node: fx.Node) -> bool:
    return any(isinstance(a, fx.Node) and a.target is aten.cat.default for a in node.args)


def _match_rope(root: fx.Node) -> Found | Failed:
    plain = Op(aten.mul.Tensor, (_x, _cos), swap=True)
    turned = Op(aten.mul.Tensor, (_turned, _sin), swap=True)
    found = match(Op(aten.add.Tensor, (plain, turned), swap=True), root)
    if isinstance(found, Failed):
        return found
    width = found.bound["x"].meta["val"].shape[-1]
    if found.bound["half"] * 2 != width:
        return Failed(6, f"the halves meet at {found.bound['half']}, not in the middle of {width}")
    return found


def _rewrite(rw: Rewriter, root: fx.Node, found: Found) -> None:
    bound = found.bound
    new = rw.call(torch.ops.mxfx.rope.default, bound["x"], bound["cos"], bound["sin"], like=root)
    rw.replace(root, new)


@ROPES_RAISED.means
def ropes_raised(program: Program, selected: Selected) -> str | None:
    """No sum is left that the pattern of a rotary embedding covers."""
    for node in program.graph.nodes:
        if _is_candidate(node) and isinstance(_match_rope(node), Found):
            return f"{node.name} still spells out a rotary embedding"
    return None
