"""``raise-rope``: rotary position embedding as one node."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import fx
from torch.ops import aten

from mxfx.graph.program import Program
from mxfx.rewrite import Context, Exact, Numerics, Pass, Rewriter, register
from mxfx.rewrite.facts import ROPES_RAISED, Fact, Selected
from mxfx.rewrite.pattern import Failed, Found, Op, Var, is_node, is_number, match


@register
@dataclass(frozen=True)
class RaiseRope(Pass):
    """Turn each rotary embedding in the half-split layout (arXiv 2104.09864, eq. 34) into one node.

    Before::

        %t = cat([neg(%x[..., half:]), %x[..., :half]], -1)
        %y = %x * unsqueeze(%cos, 1) + %t * unsqueeze(%sin, 1)

    After::

        %y = mxfx.rope(%x, %cos, %sin)

    Where the halves turn the other way round (``cat([%x[..., half:], neg(%x[..., :half])])``) the sine changes its
    sign. Cosines that no raised embedding reads are reported: another layout (interleaved pairs) stays spelled out.
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
        for cosine in _unread(rw.program):
            rw.skip(cosine, "no rotary embedding in the half-split layout reads these cosines: another layout?")


def _unread(program: Program) -> list[fx.Node]:
    """Cosines that no raised embedding depends on."""
    pending = [node.args[1] for node in program.nodes("rope")]
    reached: set[fx.Node] = set()
    while pending:
        node = pending.pop()
        if isinstance(node, fx.Node) and node not in reached:
            reached.add(node)
            pending += node.all_input_nodes
    return [node for node in program.graph.nodes if node.target is aten.cos.default and node not in reached]


def _is_candidate(node: fx.Node) -> bool:
    """A sum of two products, one of them over a concatenation: what every spelling of RoPE ends in."""
    if node.target is not aten.add.Tensor:
        return False
    products = [a for a in node.args[:2] if isinstance(a, fx.Node) and a.target is aten.mul.Tensor]
    return len(products) == 2 and any(_has_cat(p) for p in products)


def _has_cat(node: fx.Node) -> bool:
    return any(isinstance(a, fx.Node) and a.target is aten.cat.default for a in node.args)


@cache
def _forms() -> tuple[Op, Op]:
    """The halves turned one way, and the other."""
    x, half = Var("x", is_node), Var("half", is_number)
    cos, sin = (Op(aten.unsqueeze.default, (Var(name, is_node), 1)) for name in ("cos", "sin"))
    low = Op(aten.slice.Tensor, (x, 3, 0, half))
    high = Op(aten.slice.Tensor, (x, 3, half, Var("end", lambda a: isinstance(a, int) and a >= 1 << 62)))
    turned = [Op(aten.neg.default, (high,)), low], [high, Op(aten.neg.default, (low,))]
    plain = Op(aten.mul.Tensor, (x, cos), swap=True)
    there, back = (Op(aten.mul.Tensor, (Op(aten.cat.default, (halves, -1)), sin), swap=True) for halves in turned)
    return Op(aten.add.Tensor, (plain, there), swap=True), Op(aten.add.Tensor, (plain, back), swap=True)


def _match_rope(root: fx.Node) -> Found | Failed:
    tried = [match(form, root) for form in _forms()]
    found = next((one for one in tried if isinstance(one, Found)), None)
    if found is None:
        return max((one for one in tried if isinstance(one, Failed)), key=lambda one: one.depth)
    width = found.bound["x"].meta["val"].shape[-1]
    if found.bound["half"] * 2 != width:
        return Failed(6, f"the halves meet at {found.bound['half']}, not in the middle of {width}")
    return found


def _rewrite(rw: Rewriter, root: fx.Node, found: Found) -> None:
    bound = found.bound
    sin = bound["sin"]
    if not any(node.target is aten.cat.default and _negates_first(node) for node in found.nodes):
        sin = rw.call(aten.neg.default, sin, like=root)
    new = rw.call(torch.ops.mxfx.rope.default, bound["x"], bound["cos"], sin, like=root)
    rw.replace(root, new)


def _negates_first(halves: fx.Node) -> bool:
    first = halves.args[0][0]
    return isinstance(first, fx.Node) and first.target is aten.neg.default


@ROPES_RAISED.means
def ropes_raised(program: Program, selected: Selected) -> str | None:
    """No sum is left that the pattern of a rotary embedding covers."""
    for node in program.graph.nodes:
        if _is_candidate(node) and isinstance(_match_rope(node), Found):
            return f"{node.name} still spells out a rotary embedding"
    return None
