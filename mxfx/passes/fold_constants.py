"""``fold-constants``: what weights alone decide is computed once, at compile time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from mxfx.graph.execute import value_of
from mxfx.graph.node import op_name
from mxfx.graph.program import NOMINAL_COMPUTE, NOMINAL_MODEL, compute_dtype
from mxfx.rewrite import ALL, Context, Exact, Numerics, Pass, Rewriter, Selector, register
from mxfx.rewrite.basis import free_name
from mxfx.rewrite.operands import readers_of


@register
@dataclass(frozen=True)
class FoldConstants(Pass):
    """Replace calls whose operands are all weights by weights that hold their results, in the precision of the run.

    Before::

        %w = to(@model.norm.weight, float32)
        %g = add(%w, 1.0)                                # Gemma's gain
        %n = mul(%x, %g)

    After::

        %n = mul(%x, @folded.add)

    A quantizer of a weight folds as well. A result may take ``max_growth`` bytes more than the weights that then
    nobody reads; random calls, calls that write to an operand and weights without data (meta device) stay.

    max_growth: bytes that a result may take more than the weights that nobody reads then.
    """

    name: ClassVar[str] = "fold-constants"
    numerics: ClassVar[Numerics] = Exact()
    max_growth: int = 1 << 20
    select: Selector = ALL

    def run(self, rw: Rewriter, ctx: Context) -> None:
        decided = _decided_by_weights(rw.program.graph)
        for node in rw.program.nodes():
            if node.op != "call_function" or node not in decided or all(user in decided for user in node.users):
                continue
            if not self.select(node):
                continue
            reason = self._why_not(rw, node, decided[node])
            if reason is not None:
                rw.skip(node, reason)
            elif rw.match(node, note=op_name(node)):
                self._fold(rw, node)

    def _why_not(self, rw: Rewriter, node: fx.Node, cone: frozenset[fx.Node]) -> str | None:
        val = node.meta["val"]
        if not isinstance(val, Tensor):
            return f"it gives no tensor but {type(val).__name__}"
        working = rw.weights.working
        real = _real(rw, val.dtype)
        if val.is_floating_point() and torch.promote_types(real, working) != working:
            return f"its result is {real}, of which the store keeps {working}"
        if val.is_floating_point() and real not in (rw.program.dtype, compute_dtype(rw.program.dtype)):
            return f"its result is {real}, in which no weight of a {rw.program.dtype} program is read"
        leaves = [n for n in cone if n.op == "get_attr"]
        tensors = {n: rw.weights[str(n.target)] for n in leaves}
        if any(tensor.device.type == "meta" for tensor in tensors.values()):
            return "its weights have no data (meta device)"
        # A tied weight has several names, and may be read under each.
        homes = {rw.weights.canonical(str(n.target)): n.meta["val"].nbytes for n in leaves}
        freed = sum(size for name, size in homes.items() if all(user in cone for user in readers_of(rw.program, name)))
        growth = val.nbytes - freed
        return None if growth <= self.max_growth else f"the result would take {growth:,} bytes more than its weights"

    def _fold(self, rw: Rewriter, node: fx.Node) -> None:
        val, dtype = node.meta["val"], rw.program.dtype
        if "lowered" in rw.program.facts:
            constant = val.dtype == compute_dtype(dtype) != dtype
        else:
            constant = val.dtype == NOMINAL_COMPUTE
        new = rw.add_weight(
            free_name(rw, f"folded.{node.name}"),
            value_of(rw.program, node).contiguous(),
            node,
            constant=constant,
        )
        new.meta["val"] = val
        rw.replace(node, new)


def _real(rw: Rewriter, dtype: torch.dtype) -> torch.dtype:
    """What a fake value's dtype stands for: before a program is lowered, a role."""
    roles = {NOMINAL_MODEL: rw.program.dtype, NOMINAL_COMPUTE: compute_dtype(rw.program.dtype)}
    return dtype if "lowered" in rw.program.facts else roles.get(dtype, dtype)


def _decided_by_weights(graph: fx.Graph) -> dict[fx.Node, frozenset[fx.Node]]:
    """Nodes that no input reaches, each with all that it is computed from, itself included."""
    found: dict[fx.Node, frozenset[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            found[node] = frozenset({node})
        elif node.op == "call_function" and _is_pure(node.target):
            operands = node.all_input_nodes
            if operands and all(operand in found for operand in operands):
                found[node] = frozenset({node}).union(*(found[operand] for operand in operands))
    return found


def _is_pure(target: object) -> bool:
    """Whether a call gives the same for the same operands and leaves them as they are."""
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return not target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in target.tags
