"""``round-weights``: round to nearest what no calibrated pass took."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from mxfx.graph.node import info, path_of
from mxfx.graph.program import Program
from mxfx.ops.catalogue import spec, weights_of
from mxfx.rewrite import ALL, Context, Lossy, Numerics, Pass, Rewriter, Selector, register
from mxfx.rewrite.basis import untie
from mxfx.rewrite.facts import ANNOTATED, LOWERED, ROUNDED_TO_NEAREST, WEIGHTS_ROUNDED, Fact, Selected
from mxfx.rewrite.operands import is_rounded, mark_rounded, not_rounded, readers_of, weight_format


@register
@dataclass(frozen=True)
class RoundWeights(Pass):
    """Round every annotated weight onto its format along its input axis, once, at compile time.

    Before::

        @w : bf16[out, in]      {weight: mxint4@32}

    After::

        @w : round(w) on the grid of mxint4@32, blocks along ``in``

    Weights that ``gptq`` put on the grid are skipped. A tied weight that other nodes read without a format, or in
    another one, is an error: rounding it here would silently round it there.

    untie: give the node a tensor of its own instead of refusing.
    """

    name: ClassVar[str] = "round-weights"
    requires: ClassVar[frozenset[Fact]] = frozenset({ANNOTATED})
    provides: ClassVar[frozenset[Fact]] = frozenset({WEIGHTS_ROUNDED, ROUNDED_TO_NEAREST})
    forbids: ClassVar[frozenset[Fact]] = frozenset({LOWERED})
    numerics: ClassVar[Numerics] = Lossy()
    by_phase: ClassVar[bool] = True
    select: Selector = ALL
    untie: bool = False

    def provided(self) -> frozenset[Fact]:
        """A part of the weights leaves something to calibrate."""
        return self.provides if self.select == ALL else self.provides - {ROUNDED_TO_NEAREST}

    def run(self, rw: Rewriter, ctx: Context) -> None:
        for node in rw.program.nodes():
            if not self.select(node):
                continue
            for operand in info(node).formats:
                if spec(node).has(operand) and spec(node).operand(operand).stored:
                    self._round(rw, node, operand)

    def _round(self, rw: Rewriter, node: fx.Node, operand: str) -> None:
        fmt = info(node).formats[operand].format
        source = weights_of(node).get(operand)
        if is_rounded(node, operand):
            rw.skip(node, f"{operand} is on the grid of {fmt} already", done=True)
            return
        if source is None:
            rw.skip(node, f"{operand} is computed, not stored")
            return
        readers = readers_of(rw.program, str(source.target))
        stranger = next((r for r in readers if weight_format(r, str(source.target), rw.program) != fmt), None)
        if stranger is not None and self.untie and operand == "weight" and rw.weights.tied_to(str(source.target)):
            untie(rw, node)
            source, readers = weights_of(node)[operand], [node]
        elif stranger is not None:
            found = weight_format(stranger, str(source.target), rw.program)
            raise ValueError(
                f"round-weights: {source.target} is {fmt} at {path_of(node)} and {found or 'unquantized'} "
                f"at {path_of(stranger)}, which reads the same tensor; untie it (fuse-norm does) or annotate both alike"
            )
        if rw.match(node, note=f"{operand} {fmt}"):
            axis = spec(node).axis(operand)
            assert axis is not None
            rw.set_weight(str(source.target), fmt.fake_quantize(rw.weights.master(str(source.target)), axis))
            for reader in readers:
                mark_rounded(rw, reader, operand)


@ROUNDED_TO_NEAREST.means
def rounded_to_nearest(program: Program, selected: Selected) -> str | None:
    return not_rounded(program, selected, lambda operand: True)
