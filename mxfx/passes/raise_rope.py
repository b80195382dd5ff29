"""``raise-rope``: rotary position embedding as one node."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx
from torch.ops import aten

from mxfx.graph.program import Program
from mxfx.graph.regions import Refusal
from mxfx.graph.regions.rotation import Rotation, is_rotary, rotation, text_nodes
from mxfx.ops.catalogue import spec
from mxfx.rewrite import Context, Exact, Numerics, Pass, Rewriter, register
from mxfx.rewrite.facts import ROPES_RAISED, Fact, Selected


@register
@dataclass(frozen=True)
class RaiseRope(Pass):
    """Turn each rotary embedding (arXiv 2104.09864, eq. 34) into one node, however the model spells it.

    Before::

        %t = cat([neg(%x[..., half:]), %x[..., :half]], -1)
        %y = %x * unsqueeze(%cos, 1) + %t * unsqueeze(%sin, 1)

    After::

        %y = mxfx.rope(%x, %cos, %sin)

    A sum of products is a rotary embedding if it computes one, which is tried on numbers. Channels may turn in halves
    or in pairs that lie side by side, which moves around ``rope`` then say; cosines may come once a channel or once a
    pair of channels; heads may stand before tokens or behind them; where the turn goes the other way round the sine
    changes its sign. Cosines that no raised embedding reads are reported.
    """

    name: ClassVar[str] = "raise-rope"
    provides: ClassVar[frozenset[Fact]] = frozenset({ROPES_RAISED})
    numerics: ClassVar[Numerics] = Exact()
    required: ClassVar[bool] = True

    def run(self, rw: Rewriter, ctx: Context) -> None:
        text = text_nodes(rw.program)
        raiser = _Raiser(rw)
        for root in filter(is_rotary, rw.program.nodes()):
            found = rotation(root, text)
            if isinstance(found, Refusal):
                rw.skip(root, f"no rotary embedding: {found.reason}")
            elif rw.match(root, note=_described(found)):
                rw.replace(root, raiser.raised(root, found))
        for cosine in _unread(rw.program):
            rw.skip(cosine, "no rotary embedding that is known reads these cosines: another layout?")


def _described(found: Rotation) -> str:
    said = {
        "channels in pairs": found.pairs_in,
        "heads behind tokens": found.tokens_first,
        "backwards": found.backwards,
    }
    return ", ".join(words for words, holds in said.items() if holds)


class _Raiser:
    """Puts ``rope``, and the moves that its layout asks for, in the place of rotary embeddings."""

    def __init__(self, rw: Rewriter) -> None:
        self._rw = rw
        self._tables: dict[tuple[fx.Node, str, bool], fx.Node] = {}
        #: Layers are alike: what a call gives is known from the first. Views of symbolic sizes are slow to try.
        self._results: dict[str, object] = {}

    def raised(self, root: fx.Node, found: Rotation) -> fx.Node:
        """A node with the numbers and the shape of ``root``."""
        x = found.x
        if torch.promote_types(x.meta["val"].dtype, found.cos.meta["val"].dtype) != root.meta["val"].dtype:
            x = self._call(root, torch.ops.mxfx.cast.default, x, "compute")
        x = self._call(root, aten.transpose.int, x, 1, 2) if found.tokens_first else x
        pairs = x.meta["val"].shape[-1] // 2
        sizes = self._sizes(root, x) if found.pairs_in else []
        if found.pairs_in:
            apart = self._call(root, aten.reshape.default, x, [*sizes, pairs, 2])
            turned = self._call(root, aten.transpose.int, apart, 3, 4)
            x = self._call(root, aten.reshape.default, turned, [*sizes, 2 * pairs])
        cos = self._table(root, found.cos, found.angles, False)
        sin = self._table(root, found.sin, found.angles, found.backwards)
        y = self._call(root, torch.ops.mxfx.rope.default, x, cos, sin)
        if found.pairs_out:
            halves = self._call(root, aten.reshape.default, y, [*sizes, 2, pairs])
            y = self._call(root, aten.transpose.int, halves, 3, 4)
            if root.meta["val"].dim() == 4:
                y = self._call(root, aten.reshape.default, y, [*sizes, 2 * pairs])
        return self._call(root, aten.transpose.int, y, 1, 2) if found.tokens_first else y

    def _sizes(self, root: fx.Node, x: fx.Node) -> list[fx.Node | int]:
        """Batch, heads and sequence of ``x``, each as a number or as the node that says it."""
        shape = x.meta["val"].shape[:3]
        return [s if isinstance(s, int) else self._call(root, aten.sym_size.int, x, i) for i, s in enumerate(shape)]

    def _table(self, root: fx.Node, table: fx.Node, angles: str, negated: bool) -> fx.Node:
        """Cosines or sines, one a channel as ``rope`` takes them; made once for all that read them."""
        key = (table, angles, negated)
        if key not in self._tables:
            parts = [table, table]
            if angles == "pairs":
                end = (1 << 63) - 1
                parts = [self._call(root, aten.slice.Tensor, table, 2, first, end, 2) for first in (0, 1)]
            elif angles == "first":
                parts = [self._call(root, aten.slice.Tensor, table, 2, 0, table.meta["val"].shape[-1] // 2)] * 2
            made = table if angles == "whole" else self._call(root, aten.cat.default, parts, -1)
            self._tables[key] = self._call(root, aten.neg.default, made) if negated else made
        return self._tables[key]

    def _call(self, root: fx.Node, target: Callable, *args: Any) -> fx.Node:
        key = f"{target} {fx.map_arg(args, _signature)}"
        new = self._rw.call(target, *args, like=root, val=self._results.get(key))
        self._results[key] = new.meta["val"]
        return new


def _signature(node: fx.Node) -> object:
    val = node.meta["val"]
    return (val.dtype, tuple(val.shape), val.stride()) if isinstance(val, torch.Tensor) else val


def _unread(program: Program) -> list[fx.Node]:
    """Cosines that no raised embedding depends on."""
    pending = [spec(node).get("cos") for node in program.nodes("rope")]
    reached: set[fx.Node] = set()
    while pending:
        node = pending.pop()
        if isinstance(node, fx.Node) and node not in reached:
            reached.add(node)
            pending += node.all_input_nodes
    return [node for node in program.graph.nodes if node.target is aten.cos.default and node not in reached]


@ROPES_RAISED.means
def ropes_raised(program: Program, selected: Selected) -> str | None:
    """No sum is left that computes a rotary embedding."""
    text = text_nodes(program)
    for node in filter(is_rotary, program.graph.nodes):
        if not isinstance(rotation(node, text), Refusal):
            return f"{node.name} still spells out a rotary embedding"
    return None
