"""Rows of E4M3 times packed weights, expanded to rows of E4M3: one product for all that stand side by side.

Importable only where `triton` is.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from mxfx.formats import Format
from mxfx.ops.fp8 import E4M3, from_rows
from mxfx.ops.kernels.packed_triton import expand, expand_to_e4m3
from mxfx.ops.kernels.paths import Path

try:
    from mxfx.ops.kernels.e4m3_gluon import multiply_rows_of_e4m3
except ImportError:  # a Triton without Gluon for Hopper
    multiply_rows_of_e4m3 = None

#: Ada and Hopper: the first with tensor cores for FP8.
FP8_CAPABILITY = (8, 9)
HOPPER = (9, 0)


@cache
def has_e4m3(device: torch.device) -> bool:
    """Whether a device has E4M3; the interpreter, which runs on a CPU, has."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= FP8_CAPABILITY


@cache
def sums_in_float32(device: torch.device) -> bool:
    """Whether a device adds what its FP8 instructions give in float32: Hopper, with a Triton that has Gluon."""
    return (
        multiply_rows_of_e4m3 is not None
        and device.type == "cuda"
        and torch.cuda.get_device_capability(device) == HOPPER
    )


def multiply_e4m3(
    rows: Tensor,
    factors: Tensor,
    codes: list[Tensor],
    scales: list[Tensor],
    biases: list[Tensor],
    residual: Tensor | None,
    fmt: Format,
    dtype: torch.dtype,
    path: Path,
) -> Tensor:
    """`residual + linear(rows · factors, weights, biases)`, (m, Σ n), rounded to `dtype` before and after the residual.

    rows, bytes (m, k), and factors, float32 (m, 1), are `mxfx.ops.fp8.to_rows`'s; residual (m, Σ n), contiguous.
    Weights are expanded one below the other. `path` is EXACT, whose sums are float32's, FAST, whose sums are cuBLAS's,
    of which tensor cores keep some 14 bits, or DECODED: the product is one in `dtype`.
    """
    width, channels = rows.shape[-1], [c.shape[0] for c in codes]
    bias = torch.cat(biases) if biases else None
    if path is Path.DECODED:
        wide = torch.empty((sum(channels), width), dtype=dtype, device=rows.device)
        for c, s, part in zip(codes, scales, wide.split(channels), strict=True):
            expand(c, s, fmt, part)
        out = F.linear(from_rows(rows, factors, dtype), wide, bias)
        return out if residual is None else residual + out
    weight = torch.empty((sum(channels), width), dtype=torch.uint8, device=rows.device)
    of_channels = torch.empty(sum(channels), dtype=torch.float32, device=rows.device)
    for c, s, part, factor in zip(codes, scales, weight.split(channels), of_channels.split(channels), strict=True):
        expand_to_e4m3(c, s, fmt, part, factor)
    if path is Path.EXACT:
        out = torch.empty((rows.shape[0], sum(channels)), dtype=dtype, device=rows.device)
        joined = None if residual is None or residual.dtype != dtype else residual
        multiply_rows_of_e4m3(rows.view(E4M3), factors.view(-1), weight.view(E4M3), of_channels, bias, joined, out)
        return out if residual is joined else residual + out
    out = torch._scaled_mm(
        rows.view(E4M3),
        weight.view(E4M3).t(),
        scale_a=factors,
        scale_b=of_channels.view(1, -1),
        out_dtype=dtype,
        # Sums of all products in the tensor cores' own precision would be faster, and off by up to 2^-8 of a row.
        use_fast_accum=False,
    )
    out = out if bias is None else out + bias
    return out if residual is None else residual + out
