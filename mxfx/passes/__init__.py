"""All passes, one file each. Importing this package registers them."""

from mxfx.passes.annotate import Annotate, Rule
from mxfx.passes.insert_fake_quant import InsertFakeQuant
from mxfx.passes.lower import Lower
from mxfx.passes.quantize_kv_cache import QuantizeKvCache
from mxfx.passes.raise_attention import RaiseAttention
from mxfx.passes.raise_norm import RaiseNorm
from mxfx.passes.raise_rope import RaiseRope
from mxfx.passes.round_weights import RoundWeights

__all__ = [
    "Annotate",
    "InsertFakeQuant",
    "Lower",
    "QuantizeKvCache",
    "RaiseAttention",
    "RaiseNorm",
    "RaiseRope",
    "RoundWeights",
    "Rule",
]
