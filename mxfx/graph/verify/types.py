"""Level 5: every op run on fake tensors gives the shape and dtype that its node states."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from mxfx.graph.fake import fake_mode_of, runner_of, sizes_text
from mxfx.graph.program import Program
from mxfx.graph.verify.fault import VerifyError, described, fault, first_line

_INPUTS = ("input_ids", "position_ids", "attention_mask")


def types(program: Program, nodes: list[fx.Node], fragment: bool) -> int:
    mode = fake_mode_of(program.graph)
    if mode is None:
        raise VerifyError("the graph carries no fake tensors; make programs with mxfx.trace or the IR parser")
    runner = runner_of(mode)
    executed = 0
    for node in nodes:
        if node.op == "placeholder":
            _input_type(node)
        if node.op == "output" and not fragment:
            _logits_type(node)
        if node.op != "call_function":
            continue
        executed += 1
        try:
            actual = runner.run(node)
        except Exception as error:
            raise fault(node, f"the op refuses its operands: {first_line(error)}", "check shapes and dtypes") from error
        if not _same(actual, node.meta["val"]):
            stated, found = described(node.meta["val"]), described(actual)
            raise fault(
                node, f"it states {stated}, the op gives {found}", "create it with Rewriter.call, or fix its operands"
            )
    return executed


def _input_type(node: fx.Node) -> None:
    val = node.meta["val"]
    if node.target in _INPUTS and not (isinstance(val, Tensor) and val.dim() == 2 and val.dtype == torch.int64):
        raise fault(node, f"it is {described(val)}", "token inputs are int64 (batch, seq)")


def _logits_type(node: fx.Node) -> None:
    val = node.args[0].meta["val"]
    if not (isinstance(val, Tensor) and val.dim() == 3 and val.is_floating_point()):
        raise fault(node, f"it returns {described(val)}", "return floating logits (batch, seq, vocabulary)")


def _same(actual: object, stated: object) -> bool:
    if actual is stated:
        return True
    if isinstance(actual, Tensor) and isinstance(stated, Tensor):
        return actual.dtype == stated.dtype and sizes_text(actual) == sizes_text(stated)
    if isinstance(actual, list | tuple) and isinstance(stated, list | tuple):
        return len(actual) == len(stated) and all(map(_same, actual, stated))
    return not isinstance(actual, Tensor) and not isinstance(stated, Tensor) and str(actual) == str(stated)
