"""What comes before a transform, in registers: SiLU·up and RoPE, rounded as the separate ops round.

Importable only where `triton` is.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mxfx.ops.kernels.rounding_triton import as_stored


@triton.jit
def silu_times(gate, up):
    """`silu(gate) * up` in float32, silu rounded to the dtype as the two separate ops do."""
    wide = gate.to(tl.float32)
    return as_stored(wide / (1.0 + tl.exp(-wide)), gate.dtype) * up.to(tl.float32)


@triton.jit
def rotate(x, turned, cos, sin, first):
    """RoPE of `x` and the channels that it turns with, in float32, each step rounded as the separate ops do."""
    one = as_stored(x.to(tl.float32) * cos.to(tl.float32), x.dtype)
    turned = turned.to(tl.float32)
    return one + as_stored(tl.where(first, -turned, turned) * sin.to(tl.float32), x.dtype)
