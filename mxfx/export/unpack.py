"""Packed weights as the floats that they stand for: for targets that hold a model in its source's terms."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from mxfx.formats import Format, parse
from mxfx.formats.stored import restore
from mxfx.graph.node import info, operands, set_info
from mxfx.graph.program import Program
from mxfx.rewrite.rewriter import Rewriter

aten = torch.ops.aten
_CODES, _SCALES = ".codes", ".scales"


def unpacked(program: Program) -> Program:
    """The program with ``mx_linear`` and ``mx_embedding`` as linears and embeddings of float weights, bit for bit.

    A program without packed weights is given back as it is.
    """
    if not _packed(program):
        return program
    rw = Rewriter(program.copy(), "unpack")
    for node in _packed(rw.program):
        given = operands(node)
        fmt, source = parse(str(given["format"])), given["codes"]
        assert isinstance(source, fx.Node)
        name = str(source.target).removesuffix(_CODES)
        if name not in rw.weights:
            rw.weights.add(name, _floats(rw.program, name, fmt, node), rw.pass_name)
        weight = rw.weight(name, node)
        if "ids" in given:
            new = rw.call(aten.embedding.default, weight, given["ids"], like=node)
        else:
            new = rw.call(aten.linear.default, given["x"], weight, given["bias"], like=node, val=node.meta["val"])
        rw.replace(node, new)
        set_info(new, info(node))
    rw.graph.eliminate_dead_code()
    return rw.program


def _packed(program: Program) -> list[fx.Node]:
    ops = (torch.ops.mxfx.mx_linear.default, torch.ops.mxfx.mx_embedding.default)
    return [node for node in program.graph.nodes if node.target in ops]


def _floats(program: Program, name: str, fmt: Format, node: fx.Node) -> Tensor:
    codes, scales = program.weights[name + _CODES], program.weights[name + _SCALES]
    given = operands(node)
    width = given.get("width")
    if not isinstance(width, int):
        source = given["x"]
        assert isinstance(source, fx.Node)
        width = int(source.meta["val"].shape[-1])
    return restore(codes, scales, fmt, width, torch.float32)
