"""Level 2: a record and a fake value on every node."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from mxfx.graph.fake import fake_mode_of
from mxfx.graph.node import META_KEY, NodeInfo
from mxfx.graph.program import Program
from mxfx.graph.verify.fault import fault


def metadata(program: Program) -> None:
    mode = fake_mode_of(program.graph)
    for node in program.graph.nodes:
        if node.op == "output":
            continue
        if not isinstance(node.meta.get(META_KEY), NodeInfo):
            raise fault(node, "it has no provenance record", "create nodes through the Rewriter")
        if "val" not in node.meta:
            raise fault(
                node, "it has no fake value", "create nodes through the Rewriter, which runs the op on fake tensors"
            )
        for val in tensors(node.meta["val"]):
            if getattr(val, "fake_mode", None) is not mode:
                raise fault(
                    node, "its value is a real tensor or of another trace", "make values with Rewriter.run_fake"
                )


def tensors(val: object) -> Iterable[Tensor]:
    values = val if isinstance(val, list | tuple) else (val,)
    return (v for v in values if isinstance(v, Tensor))
