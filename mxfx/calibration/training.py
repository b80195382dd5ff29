"""A program as a module that gradients pass through: quantizers are straight-through, chosen weights are parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mxfx.formats import Format
from mxfx.graph.module import build
from mxfx.graph.node import operands
from mxfx.graph.program import Program
from mxfx.rewrite import Context, Rewriter, find_pass

_fake_quantize = torch.ops.mxfx.fake_quantize.default


def straight_through(x: Tensor, format: str, axis: int = -1) -> Tensor:
    """``mxfx::fake_quantize`` with the gradient of the identity (arXiv 1308.3432). ``lower`` keeps this call."""
    return torch.ops.mxfx.fake_quantize(x, format, axis)


def trainable(
    program: Program, weights: Mapping[str, Format], device: torch.device
) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """A float32 module of ``program`` on ``device``, and its parameters by weight name.

    Each weight in ``weights`` is rounded onto its format in every forward pass; its parameter is what stands behind the
    rounding. All other weights are constants.
    """
    twin = program.twin(torch.float32)
    rw = Rewriter(twin, "trainable")
    for node in list(twin.graph.nodes):
        if node.target is _fake_quantize:
            bound = operands(node)
            call = rw.call(
                straight_through, bound["x"], bound["format"], bound["axis"], like=node, val=node.meta["val"]
            )
            rw.replace(node, call)
        elif node.op == "get_attr" and twin.weights.canonical(str(node.target)) in weights:
            fmt = weights[twin.weights.canonical(str(node.target))]
            readers = list(node.users)
            call = rw.call(straight_through, node, str(fmt), -1, like=node, after=node, val=node.meta["val"])
            for reader in readers:
                reader.replace_input_with(node, call)
    find_pass("lower")().run(rw, Context())
    twin.graph.eliminate_dead_code()
    twin.facts = twin.facts | {"lowered"}
    module = build(twin).to(device)
    parameters = {name: module.get_parameter(name) for name in weights}
    for parameter in parameters.values():
        # Built modules share storage with the store; an optimizer writes in place.
        parameter.data = parameter.data.clone()
        parameter.requires_grad_()
    return module, parameters


@contextmanager
def fast_float32(device: torch.device) -> Iterator[None]:
    """TF32 matrix products on CUDA while training: ten bits of mantissa are finer than any grid trained for."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = device.type == "cuda"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
