"""``mxfx::rms_norm`` and ``mxfx::layer_norm``."""

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


@define("layer_norm", operands=(weight("weight"), activation("input", "x"), OUTPUT, weight("bias", axis=None)))
def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, offset: float = 0.0, spelled: bool = False
) -> Tensor:
    """Layer norm over the last axis (arXiv 1607.06450, eq. 4), computed in max(float32, input).

    ``x`` is ``(..., hidden)``; ``weight`` and ``bias`` are ``(hidden,)`` or None. The gain is ``offset + weight``.
    ATen's kernel computes it, or, where a model is ``spelled`` so, the mean, what is left of it and its mean square,
    one after the other: equal as real functions, not in bits.
    """
    gain = weight if weight is None or not offset else weight + offset
    if not spelled:
        return torch.nn.functional.layer_norm(x, x.shape[-1:], gain, bias, eps)
    wide = compute(x)
    centred = wide - wide.mean(-1, keepdim=True)
    normal = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps)
    normal = normal if gain is None else compute(gain) * normal
    return (normal if bias is None else normal + compute(bias)).to(x.dtype)
