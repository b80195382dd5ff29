"""``mxfx::arange``: consecutive numbers on the device of an operand."""

from __future__ import annotations

import torch
from torch import Tensor

from mxfx.ops.catalogue import describe, shape_of
from mxfx.ops.dialect import define

_OPERANDS = (shape_of("anchor"),)


@define("arange", operands=_OPERANDS)
def arange(anchor: Tensor, start: int, end: int, step: int = 1) -> Tensor:
    """``start, start + step, …`` below ``end``, int64, on the device of ``anchor``."""
    return torch.arange(start, end, step, device=anchor.device)


describe(arange, "arange", operands=_OPERANDS)
