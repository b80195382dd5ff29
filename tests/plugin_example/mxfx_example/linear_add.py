"""``mxfx::linear_add``: a linear and the residual sum behind it as one op, with a kernel for narrow inputs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mxfx.ops.catalogue import OUTPUT, Contraction, activation, plain, weight
from mxfx.ops.dialect import define
from mxfx.ops.kernels import kernel

WIDEST = 64


def _shape(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    if x.shape[-1] != weight.shape[-1] or residual.shape[-1] != weight.shape[0]:
        raise ValueError(
            f"linear_add: input {tuple(x.shape)}, weight {tuple(weight.shape)} and residual {tuple(residual.shape)} "
            "do not fit"
        )
    return residual.new_empty(residual.shape)


@define(
    "linear_add",
    operands=(weight("weight", features=-2), activation("input", "x"), plain("residual"), OUTPUT),
    contracts=(Contraction("input", "weight", over="input channels"),),
    fake=_shape,
)
def linear_add(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    """``residual + x @ weight.mT``; ``x`` is ``(…, in)``, ``weight`` ``(out, in)``, ``residual`` ``(…, out)``."""
    return residual + F.linear(x, weight)


def takes(x: Tensor, weight: Tensor, residual: Tensor) -> str | None:
    return None if x.shape[-1] <= WIDEST else f"{x.shape[-1]} input channels, it holds {WIDEST}"


@kernel("linear_add", "cpu", takes=takes, name="narrow-linear-add")
def narrow(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    return torch.add(F.linear(x, weight), residual)
