"""Packed weights on a CUDA device: each function gives a kernel's result, or `NotImplemented` for what none takes.

Importable only where `triton` is.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mxfx.formats import Format
from mxfx.ops.fp8 import E4M3, from_rows
from mxfx.ops.kernels.fp8_triton import rows_to_e4m3
from mxfx.ops.kernels.limits import DTYPES, takes_e4m3_rows, takes_few_rows, takes_packed
from mxfx.ops.kernels.packed import inexact_rows
from mxfx.ops.kernels.packed_triton import expand, expand_to_e4m3, multiply_rows
from mxfx.ops.quantize import _format

#: Up to this many products FP8 tensor cores summed MX operands exactly without the slower promotion of partial sums.
FAST_SUMS = 8192
#: Ada and Hopper: the first with tensor cores for FP8.
FP8_CAPABILITY = (8, 9)
#: What a quantizer writes at a time for `e4m3_rows` to read again: half of an H100's cache.
CACHED_BYTES = 24 << 20


def mx_linear(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, format: str) -> Tensor:
    fmt, width, channels = _format(format), x.shape[-1], codes.shape[0]
    if x.dtype not in DTYPES or not takes_packed(fmt, width) or x.numel() == 0:
        return NotImplemented
    if takes_few_rows(fmt, x.numel() // width, x.dtype):
        out = torch.empty((*x.shape[:-1], channels), dtype=x.dtype, device=x.device)
        rows = x.reshape(-1, width).contiguous()
        multiply_rows(rows, codes, scales, bias, fmt, out.view(-1, channels))
        return out
    weight = torch.empty((channels, width), dtype=x.dtype, device=x.device)
    expand(codes, scales, fmt, weight)
    return F.linear(x, weight, bias)


def mx_embedding(codes: Tensor, scales: Tensor, ids: Tensor, format: str, width: int) -> Tensor:
    """Few rows are decoded: the definition will do."""
    return NotImplemented


def e4m3_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    if x.dtype not in DTYPES or not takes_e4m3_rows(x.shape[-1]) or x.numel() == 0:
        return NotImplemented
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    payload = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    row_scales = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    rows_to_e4m3(rows, payload.view(rows.shape), row_scales.view(-1), inexact_rows(x.device))
    return payload, row_scales


def _rounded(name: str) -> Callable:
    """A quantizer and `e4m3_rows`, a part of the rows at a time, so that what lies between them stays in the cache."""
    quantizer, axis_of_rows = getattr(torch.ops.mxfx_kernels, name).default, 2 if name == "silu_mul_quantize" else 1

    def rows_of(*args):
        x = args[0]
        width = x.shape[-1]
        if x.dtype not in DTYPES or not takes_e4m3_rows(width) or x.numel() == 0:
            return NotImplemented
        given, rest = [tensor.reshape(-1, width) for tensor in args[:axis_of_rows]], args[axis_of_rows:]
        count = given[0].shape[0]
        payload = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
        row_scales = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
        height = max(CACHED_BYTES // (width * x.element_size()), 1)
        for start in range(0, count, height):
            part = quantizer(*(tensor[start : start + height] for tensor in given), *rest)
            rows_to_e4m3(
                part,
                payload.view(count, width)[start : start + height],
                row_scales.view(count)[start : start + height],
                inexact_rows(x.device),
            )
        return payload, row_scales

    return rows_of


fake_quantize_e4m3 = _rounded("fake_quantize")
transform_quantize_e4m3 = _rounded("transform_quantize")
hadamard_quantize_e4m3 = _rounded("hadamard_quantize")
norm_quantize_e4m3 = _rounded("norm_quantize")
silu_mul_quantize_e4m3 = _rounded("silu_mul_quantize")


def mx_linear_e4m3(
    payload: Tensor,
    row_scales: Tensor,
    codes: list[Tensor],
    scales: list[Tensor],
    biases: list[Tensor],
    format: str,
    dtype: torch.dtype,
) -> Tensor:
    fmt, width = _format(format), payload.shape[-1]
    if dtype not in DTYPES or not takes_packed(fmt, width) or payload.numel() == 0:
        return NotImplemented
    channels = [c.shape[0] for c in codes]
    rows, factors = payload.reshape(-1, width).contiguous(), row_scales.reshape(-1, 1).contiguous()
    out_shape = (*payload.shape[:-1], sum(channels))
    if takes_few_rows(fmt, rows.shape[0], dtype):
        out = torch.empty(out_shape, dtype=dtype, device=payload.device)
        given: list[Tensor | None] = [*biases] or [None] * len(codes)
        parts = out.view(rows.shape[0], -1).split(channels, -1)
        for c, s, bias, part in zip(codes, scales, given, parts, strict=True):
            multiply_rows(rows, c, s, bias, fmt, part, factors)
        return out
    return _product(rows, factors, codes, scales, biases, fmt, dtype).view(out_shape)


def _product(
    rows: Tensor,
    factors: Tensor,
    codes: list[Tensor],
    scales: list[Tensor],
    biases: list[Tensor],
    fmt: Format,
    dtype: torch.dtype,
) -> Tensor:
    """One FP8 GEMM for all weights, expanded one below the other; before Ada, one in `dtype`."""
    width, channels = rows.shape[-1], [c.shape[0] for c in codes]
    if torch.cuda.get_device_capability(rows.device) < FP8_CAPABILITY:
        wide = torch.empty((sum(channels), width), dtype=dtype, device=rows.device)
        for c, s, part in zip(codes, scales, wide.split(channels), strict=True):
            expand(c, s, fmt, part)
        return F.linear(from_rows(rows, factors, dtype), wide, torch.cat(biases) if biases else None)
    weight = torch.empty((sum(channels), width), dtype=torch.uint8, device=rows.device)
    of_channels = torch.empty(sum(channels), dtype=torch.float32, device=rows.device)
    for c, s, part, factor in zip(codes, scales, weight.split(channels), of_channels.split(channels), strict=True):
        expand_to_e4m3(c, s, fmt, part, factor)
    out = torch._scaled_mm(
        rows.view(E4M3),
        weight.view(E4M3).t(),
        scale_a=factors,
        scale_b=of_channels.view(1, -1),
        out_dtype=dtype,
        use_fast_accum=width <= FAST_SUMS,
    )
    return out + torch.cat(biases) if biases else out
