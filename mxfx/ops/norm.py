"""``mxfx::rms_norm``."""

from __future__ import annotations

import torch
from torch import Tensor

from mxfx.ops.catalogue import OUTPUT, activation, weight
from mxfx.ops.dialect import compute, define


@define("rms_norm", operands=(weight("weight"), activation("input", "x"), OUTPUT))
def rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0, gain_first: bool = False) -> Tensor:
    """Root-mean-square norm over the last axis (arXiv 1910.07467, eq. 4), computed in max(float32, input).

    ``x`` is ``(..., hidden)``, ``weight`` is ``(hidden,)`` or None for no gain. ``gain_first`` multiplies by
    ``offset + weight`` before the result returns to the input's dtype (Gemma, OLMo 2), else after (Llama).
    """
    wide = compute(x)
    # A traced pow/mean/rsqrt chain keeps bit-equality with the Hugging Face modules that it replaces.
    normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return normal.to(x.dtype)
    if not gain_first:
        return weight * normal.to(x.dtype)
    gain = offset + compute(weight) if offset else weight
    return (normal * gain).to(x.dtype)
