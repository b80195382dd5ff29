"""Configurations A and C by the tutorial's formulas on plain Hugging Face modules: hooks, no graph, nothing of mxfx.

MXINT with b bits, per block of B values along the last axis with m = max |x|: e = ⌈log2 m⌉, step = 2^(e − b + 1), and
x becomes step · clamp(round(x / step), −2^(b−1), 2^(b−1) − 1), ties to even. Weights and inputs of the seven linears
of a decoder layer are rounded, and keys (after RoPE) and values along the head dimension. C rounds some of these
tensors in a rotated basis: Q(x H) Hᵀ, with H the orthonormal Hadamard matrix of the whole last axis.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection
from functools import lru_cache

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

_LINEAR = re.compile(r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)")
_ATTENTION = "mase-tutorial"


def mxint(x: Tensor, bits: int = 4, block: int = 32) -> Tensor:
    """``x`` rounded in blocks along its last axis; same shape and dtype."""
    length = x.shape[-1]
    wide = nn.functional.pad(x.double(), (0, -length % block)).unflatten(-1, (-1, block))
    mantissa, exponent = torch.frexp(wide.abs().amax(-1, keepdim=True))
    # frexp gives m = mantissa · 2^exponent with mantissa in [½, 1): log2 m is whole exactly where it is ½.
    ceiling = torch.where(mantissa == 0.5, exponent - 1, exponent)
    step = torch.ldexp(torch.ones_like(mantissa), ceiling - bits + 1)
    codes = torch.round(wide / step).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return (codes * step).flatten(-2)[..., :length].to(x.dtype)


def rotated_mxint(x: Tensor, bits: int = 4, block: int = 32) -> Tensor:
    """``x`` rotated along its whole last axis, rounded, and rotated back; same shape and dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    h = hadamard(x.shape[-1]).to(x.device, wide)
    turned = (x.to(wide) @ h).to(x.dtype)
    return (mxint(turned, bits, block).to(wide) @ h.mT).to(x.dtype)


@lru_cache(maxsize=8)
def hadamard(order: int) -> Tensor:
    """Orthonormal: 2^k (Sylvester), 2^k (q + 1) or 2^k 2 (q + 1) with a prime q (Paley's first and second)."""
    for power in range(order.bit_length()):
        core = _paley(order >> power) if order % (1 << power) == 0 else None
        if core is not None:
            for _ in range(power):
                core = torch.cat([torch.cat([core, core], 1), torch.cat([core, -core], 1)], 0)
            assert torch.equal(core @ core.mT, order * torch.eye(order, dtype=core.dtype))
            return core / math.sqrt(order)
    raise ValueError(f"no Hadamard matrix of order {order} by these constructions")


def _paley(order: int) -> Tensor | None:
    if order in (1, 2):
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)[:order, :order]
    for q, second in ((order - 1, False), (order // 2 - 1, True)):
        prime = q > 2 and all(q % d for d in range(2, math.isqrt(q) + 1))
        if order % 4 or order & (order - 1) == 0 or not prime or q % 4 != (1 if second else 3):
            continue
        squares = {i * i % q for i in range(1, q)}
        chi = [0.0] + [1.0 if i in squares else -1.0 for i in range(1, q)]
        jacobsthal = torch.tensor([[chi[(i - j) % q] for j in range(q)] for i in range(q)], dtype=torch.float64)
        edge = torch.zeros(q + 1, q + 1, dtype=torch.float64)
        edge[1:, 1:] = jacobsthal
        edge[0, 1:], edge[1:, 0] = 1.0, (1.0 if second else -1.0)
        if not second:
            return edge + torch.eye(q + 1, dtype=torch.float64)
        plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        minus = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(edge, plus) + torch.kron(torch.eye(q + 1, dtype=torch.float64), minus)
    return None


def apply_config_a(model: nn.Module, bits: int = 4, block: int = 32, kv_bits: int | None = 4) -> nn.Module:
    """Quantize ``model`` in place; ``kv_bits=None`` leaves keys and values alone. Returns it."""
    for name, module in model.named_modules():
        if _LINEAR.fullmatch(name):
            module.weight.data = mxint(module.weight.data, bits, block)
    return quantize_activations(model, (), bits, block, kv_bits)


def quantize_activations(
    model: nn.Module, rotated: Collection[str], bits: int = 4, block: int = 32, kv_bits: int | None = 4
) -> nn.Module:
    """Inputs, keys and values only, in place; ``rotated`` names types of linear, or ``kv_cache``. Returns it."""
    for name, module in model.named_modules():
        if _LINEAR.fullmatch(name):
            quantize = rotated_mxint if name.rpartition(".")[2] in rotated else mxint
            module.register_forward_pre_hook(lambda _, args, q=quantize: (q(args[0], bits, block), *args[1:]))
    if kv_bits is not None:
        _quantize_cache(model, kv_bits, block, rotated_mxint if "kv_cache" in rotated else mxint)
    return model


def _quantize_cache(model: nn.Module, bits: int, block: int, quantize: Callable[[Tensor, int, int], Tensor]) -> None:
    def attention(module, query, key, value, *args, **kwargs):
        return sdpa_attention_forward(
            module, query, quantize(key, bits, block), quantize(value, bits, block), *args, **kwargs
        )

    AttentionInterface.register(_ATTENTION, attention)
    AttentionMaskInterface.register(_ATTENTION, sdpa_mask)
    model.set_attn_implementation(_ATTENTION)
