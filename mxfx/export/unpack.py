"""Packed weights as the floats that they stand for: for targets that hold a model in its source's terms."""

from __future__ import annotations

from mxfx.graph.program import Program
from mxfx.passes.unpack_weights import UnpackWeights, packed_nodes
from mxfx.rewrite import apply


def unpacked(program: Program) -> Program:
    """The program with linears and embeddings of float weights, bit for bit; one without packed weights as it is."""
    return apply(UnpackWeights(), program).program if packed_nodes(program.graph) else program
