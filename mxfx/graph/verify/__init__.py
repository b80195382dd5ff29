"""Is a program sound? Checked in levels, each resting on those before it.

1. structure: opcodes, topology, names, readers, one output, inputs as the runtime feeds them
2. metadata: a record and a fake value on every node
3. weights: no dangling read, no orphan, aliases that lead somewhere, ledger and shapes that agree with the tensors
4. schema: arity and kinds of operands, no device or dtype literal, no op that writes its operands but caches, each
written by one node before all that read it
5. types: every op run on fake tensors gives the shape and dtype that its node states
6. formats: annotations on operands that exist, blocks along the contraction axis, quantizers that agree with them
7. lowering: nothing of the dialect left once the program is lowered; and nowhere a node that nobody reads

Levels 4 to 6 look at touched nodes and their readers only where the caller says what was touched.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import fx

from mxfx.graph.mutation import unsound_write
from mxfx.graph.program import Program
from mxfx.graph.verify.fault import VerifyError, fault
from mxfx.graph.verify.formats import formats
from mxfx.graph.verify.lowering import lowered as lowered_level
from mxfx.graph.verify.metadata import metadata
from mxfx.graph.verify.schema import schema
from mxfx.graph.verify.structure import dead, structure
from mxfx.graph.verify.types import types
from mxfx.graph.verify.weights import weights


def verify(
    program: Program,
    touched: Collection[str] | None = None,
    *,
    fragment: bool = False,
) -> int:
    """Check ``program``; only ``touched`` nodes (by name) and their readers are executed again if given.

    A ``fragment`` may have any inputs and any result.

    Returns the number of nodes whose ops were asked for their types; equal calls of a trace run once. Raises
    ``VerifyError`` at the first fault.
    """
    structure(program, fragment)
    metadata(program)
    weights(program)
    nodes = [n for n in program.graph.nodes if touched is None or _is_touched(n, touched)]
    lowered = "lowered" in program.facts
    for node in nodes:
        schema(node, lowered)
    unsound = unsound_write(program)
    if unsound is not None:
        raise fault(*unsound, "let one op write a cache, before all that read it (insert-kv-cache)")
    executed = types(program, nodes, fragment)
    for node in nodes:
        formats(node, lowered)
    if lowered:
        lowered_level(program)
    dead(program)
    return executed


def _is_touched(node: fx.Node, touched: Collection[str]) -> bool:
    return node.name in touched or any(operand.name in touched for operand in node.all_input_nodes)


__all__ = ["VerifyError", "verify"]
