"""Level 1: opcodes, topology, names, readers, one output, inputs as the runtime feeds them."""

from __future__ import annotations

from collections import Counter

from torch import fx

from mxfx.graph.program import Program
from mxfx.graph.verify.fault import VerifyError, fault

_INPUTS = ("input_ids", "position_ids", "attention_mask")
_OPCODES = ("placeholder", "get_attr", "call_function", "output")


def structure(program: Program, fragment: bool) -> None:
    nodes = list(program.graph.nodes)
    for node in nodes:
        if node.op not in _OPCODES:
            raise fault(node, f"the opcode {node.op!r} is no part of a program", f"use {', '.join(_OPCODES)}")
    _topology(nodes)
    _names(nodes)
    _ends(nodes)
    if not fragment:
        _inputs(nodes)
    for symbol in program.symbols:
        if not 1 <= symbol.low <= symbol.high:
            raise VerifyError(
                f"symbol {symbol.name!r} has the empty range [{symbol.low}, {symbol.high}]; low ≤ high, from 1"
            )


def _topology(nodes: list[fx.Node]) -> None:
    seen: set[fx.Node] = set()
    known = set(nodes)
    for node in nodes:
        for operand in node.all_input_nodes:
            if operand not in known:
                raise fault(
                    node, f"it reads {operand.name}, which is not in this graph", "read a node of the same graph"
                )
            if operand not in seen:
                raise fault(node, f"it reads {operand.name}, which comes later", "move one of the two")
            if node not in operand.users:
                raise fault(
                    node, f"{operand.name} does not list it as a reader", "change operands through the Rewriter"
                )
        seen.add(node)
    for node in nodes:
        for user in node.users:
            if user not in known or node not in user.all_input_nodes:
                raise fault(node, f"{user.name} is listed as a reader and does not read it", "use Rewriter.replace")


def _names(nodes: list[fx.Node]) -> None:
    name, count = Counter(n.name for n in nodes).most_common(1)[0]
    if count > 1:
        raise VerifyError(f"{count} nodes are named {name!r}; create nodes through the Rewriter, which numbers names")


def _ends(nodes: list[fx.Node]) -> None:
    outputs = [n for n in nodes if n.op == "output"]
    if len(outputs) != 1 or nodes[-1] is not outputs[0]:
        raise VerifyError(f"the graph has {len(outputs)} outputs; it needs exactly one, as its last node")
    logits = outputs[0].args[0] if outputs[0].args else None
    if not isinstance(logits, fx.Node):
        raise fault(outputs[0], f"it returns {logits!r}", "return the node of the logits")


def _inputs(nodes: list[fx.Node]) -> None:
    given = [n for n in nodes if n.op == "placeholder"]
    targets = [str(n.target) for n in given]
    if tuple(targets[:3]) != _INPUTS:
        raise VerifyError(f"the inputs are {targets}; the first three must be {list(_INPUTS)}, in this order")
    for node in given[1:]:
        if node.args != (None,):
            raise fault(node, "this input has no default", "give it the default None: callers may leave it out")


def dead(program: Program) -> None:
    """Last of all: what else is wrong says more than the dead node that it leaves."""
    for node in program.graph.nodes:
        if node.op in ("call_function", "get_attr") and not node.users:
            raise fault(node, "nobody reads it", "erase it, or let apply() clean up")
