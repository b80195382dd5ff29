"""Configuration A by the tutorial's formulas on plain Hugging Face modules: hooks, no graph, nothing of mxfx.

MXINT with b bits, per block of B values along the last axis with m = max |x|: e = ⌈log2 m⌉, step = 2^(e − b + 1), and
x becomes step · clamp(round(x / step), −2^(b−1), 2^(b−1) − 1), ties to even. Weights and inputs of the seven linears
of a decoder layer are rounded, and keys (after RoPE) and values along the head dimension.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

_LINEAR = re.compile(r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)")
_ATTENTION = "mase-config-a"


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


def apply_config_a(model: nn.Module, bits: int = 4, block: int = 32, kv_bits: int | None = 4) -> nn.Module:
    """Quantize ``model`` in place; ``kv_bits=None`` leaves keys and values alone. Returns it."""
    for name, module in model.named_modules():
        if _LINEAR.fullmatch(name):
            module.weight.data = mxint(module.weight.data, bits, block)
            module.register_forward_pre_hook(lambda _, args: (mxint(args[0], bits, block), *args[1:]))
    if kv_bits is not None:
        _quantize_cache(model, kv_bits, block)
    return model


def _quantize_cache(model: nn.Module, bits: int, block: int) -> None:
    def attention(module, query, key, value, *args, **kwargs):
        return sdpa_attention_forward(
            module, query, mxint(key, bits, block), mxint(value, bits, block), *args, **kwargs
        )

    AttentionInterface.register(_ATTENTION, attention)
    AttentionMaskInterface.register(_ATTENTION, sdpa_mask)
    model.set_attn_implementation(_ATTENTION)
