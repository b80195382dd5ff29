"""The dialect: semantic ops ``mxfx::…``, each with a schema, a fake kernel and an ATen definition."""

import mxfx.ops.kernels  # noqa: F401  (last: kernels are providers of the ops above)
from mxfx.ops.arange import arange
from mxfx.ops.attention import at_slots, attend, attention, attention_bias, places, position_mask
from mxfx.ops.cache import cache_bias, cached_attend, cached_attention
from mxfx.ops.cast import cast
from mxfx.ops.dialect import all_ops, define, find_op
from mxfx.ops.experts import expert_linear
from mxfx.ops.mixer import mixer
from mxfx.ops.norm import layer_norm, rms_norm
from mxfx.ops.packed import mx_decode, mx_embedding, mx_expert_linear, mx_linear
from mxfx.ops.plugins import load_ops
from mxfx.ops.positions import length, positions, real_tokens, select_tokens
from mxfx.ops.quantize import fake_quantize, first_slots, keep_first_quantize
from mxfx.ops.rope import rope
from mxfx.ops.transform import block_transform, hadamard

#: Calls that may stand in a lowered graph beside ATen: traced through by torch.compile, shared by all layers.
RUNTIME_FUNCTIONS = frozenset(
    {
        arange,
        at_slots,
        attend,
        attention_bias,
        cache_bias,
        cached_attend,
        expert_linear,
        fake_quantize,
        first_slots,
        keep_first_quantize,
        mixer,
        places,
        position_mask,
        positions,
        real_tokens,
        select_tokens,
    }
)

__all__ = [
    "RUNTIME_FUNCTIONS",
    "all_ops",
    "arange",
    "at_slots",
    "attend",
    "attention",
    "attention_bias",
    "block_transform",
    "cache_bias",
    "cached_attend",
    "cached_attention",
    "cast",
    "define",
    "expert_linear",
    "fake_quantize",
    "find_op",
    "first_slots",
    "hadamard",
    "keep_first_quantize",
    "layer_norm",
    "length",
    "mixer",
    "mx_decode",
    "mx_embedding",
    "mx_expert_linear",
    "mx_linear",
    "places",
    "position_mask",
    "positions",
    "real_tokens",
    "rms_norm",
    "rope",
    "select_tokens",
]

load_ops()
