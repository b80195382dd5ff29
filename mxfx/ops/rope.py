"""``mxfx::rope``."""

from __future__ import annotations

import torch
from torch import Tensor

from mxfx.ops.catalogue import OUTPUT, activation
from mxfx.ops.dialect import define


@define("rope", operands=(activation("input", "x"), activation("cos"), activation("sin"), OUTPUT))
def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding in the half-split layout (arXiv 2104.09864, eq. 34).

    ``x`` is ``(batch, heads, seq, head_dim)``; ``cos`` and ``sin`` are ``(batch, seq, rotary)``. Where ``rotary`` is
    smaller than ``head_dim`` the caller slices; channel ``i`` rotates with channel ``i + rotary / 2``.
    """
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos + turned * sin
