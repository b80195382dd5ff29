"""Level 7: nothing of the dialect left once the program is lowered."""

from __future__ import annotations

from mxfx.graph.fake import has_dtype_of_its_own
from mxfx.graph.program import NOMINAL_COMPUTE, NOMINAL_MODEL, Program, compute_dtype
from mxfx.graph.verify.fault import fault
from mxfx.graph.verify.metadata import tensors
from mxfx.ops import find_op


def lowered(program: Program) -> None:
    for node in program.graph.nodes:
        if node.op == "call_function" and find_op(node.target) is not None:
            raise fault(
                node, "the program counts as lowered and this op is not", "run 'lower' after the pass that made it"
            )
        roles = {NOMINAL_MODEL, NOMINAL_COMPUTE} - {program.dtype, compute_dtype(program.dtype)}
        for val in tensors(node.meta.get("val")):
            if val.dtype in roles and not has_dtype_of_its_own(node):
                raise fault(
                    node, f"its value still has the nominal dtype {val.dtype}", "lower gives every value its real dtype"
                )
