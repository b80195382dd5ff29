"""Packed weights on a CUDA device: each function gives a kernel's result, or `NotImplemented` for what none takes.

Importable only where `triton` is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mxfx.formats import Format
from mxfx.formats.stored import codes_length, scales_length
from mxfx.ops.experts import expert_linear
from mxfx.ops.kernels import takes
from mxfx.ops.kernels.cuda import if_it_fits, norm_quantize
from mxfx.ops.kernels.e4m3_product import has_e4m3, multiply_e4m3, sums_in_float32
from mxfx.ops.kernels.fp8_triton import align_rows, rows_to_e4m3
from mxfx.ops.kernels.integer_mma_triton import multiply_integer_tiles
from mxfx.ops.kernels.integer_triton import multiply_integers
from mxfx.ops.kernels.limits import DTYPES, takes_e4m3_rows, takes_packed
from mxfx.ops.kernels.norm_triton import norm_triton
from mxfx.ops.kernels.norm_triton import row_scales as row_scales_of_norm
from mxfx.ops.kernels.packed import ROUNDING, inexact_rows
from mxfx.ops.kernels.packed_triton import WORD, expand, multiply_rows
from mxfx.ops.kernels.paths import Path, plan
from mxfx.ops.kernels.skinny_triton import multiply_some_rows
from mxfx.ops.kernels.transform_triton import transform_triton
from mxfx.ops.quantize import _format

#: Entries of rows of which each program of a norm finds all factors itself; more get them from a kernel before.
FACTORS_INSIDE = 8192
#: A few rows, which meet packed codes, one weight at a time.
_FEW = (Path.CODES, Path.TENSOR_CORES)


def mx_linear(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, format: str) -> Tensor:
    fmt, width, channels = _format(format), x.shape[-1], codes.shape[0]
    path = plan(fmt, None, False, x.shape[:-1].numel(), width, channels, x.dtype).path
    if path is Path.DEFINITION or not _lie_packed([codes], [scales], fmt, width):
        return NotImplemented
    if path is Path.DECODED:
        weight = torch.empty((channels, width), dtype=x.dtype, device=x.device)
        expand(codes, scales, fmt, weight)
        return F.linear(x, weight, bias)
    biases = [] if bias is None else [bias]
    out = _side_by_side(path, x.reshape(-1, width).contiguous(), [codes], [scales], biases, fmt, x.dtype)
    return out.view(*x.shape[:-1], channels)


def _lie_packed(codes: list[Tensor], scales: list[Tensor], fmt: Format, width: int) -> bool:
    """Whether weights are rows of `width` as kernels read them, one behind the other and from a word on; the definition
    refuses others, or takes them by their strides.
    """
    assert fmt.block is not None
    each = (codes_length(width, fmt), scales_length(width, fmt))
    return all(
        c.shape[:-1] == s.shape[:-1]
        and (c.shape[-1], s.shape[-1]) == each
        and c.is_contiguous()
        and s.is_contiguous()
        and c.data_ptr() % WORD == 0
        for c, s in zip(codes, scales, strict=True)
    )


def mx_expert_linear(
    x: Tensor, codes: Tensor, scales: Tensor, experts: Tensor, bias: Tensor | None, format: str
) -> Tensor:
    """Of few tokens the experts that they chose are decoded, one for each choice; else all experts of the layer."""
    fmt, width, (count, channels) = _format(format), x.shape[-1], codes.shape[:2]
    taken = x.dtype in DTYPES and takes_packed(fmt, width) and x.numel() > 0
    if not taken or not _lie_packed([codes], [scales], fmt, width):
        return NotImplemented
    chosen = experts.reshape(-1)
    if len(chosen) >= count:
        weight = torch.empty((count, channels, width), dtype=x.dtype, device=x.device)
        expand(codes.flatten(0, 1), scales.flatten(0, 1), fmt, weight.view(-1, width))
        return expert_linear(x, weight, experts, bias)
    weight = torch.empty((len(chosen), channels, width), dtype=x.dtype, device=x.device)
    expand(codes[chosen].flatten(0, 1), scales[chosen].flatten(0, 1), fmt, weight.view(-1, width))
    rows = x.unsqueeze(1).expand(*experts.shape, width) if x.dim() == 2 else x
    y = torch.bmm(rows.reshape(-1, 1, width), weight.mT).squeeze(1)
    return (y if bias is None else y + bias[chosen]).view(*experts.shape, channels)


def mx_embedding(codes: Tensor, scales: Tensor, ids: Tensor, format: str, width: int) -> Tensor:
    """Few rows are decoded: the definition will do."""
    return NotImplemented


def e4m3_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    if x.dtype not in DTYPES or not takes_e4m3_rows(x.shape[-1]) or x.numel() == 0 or not has_e4m3(x.device):
        return NotImplemented
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    payload, row_scales, inexact = _outputs(x)
    rows_to_e4m3(rows, payload.view(rows.shape), row_scales.view(-1), inexact)
    return payload, row_scales


def _outputs(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Bytes, powers of two and counter for rows like those of `x`."""
    payload = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    row_scales = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    return payload, row_scales, inexact_rows(x.device)


def _in_two(quantizer: str, *args: object) -> tuple[Tensor, Tensor]:
    """A quantizer, then `e4m3_rows`."""
    return e4m3_rows(getattr(torch.ops.mxfx_kernels, quantizer)(*args))


def _folds(x: Tensor, fmt: Format, block: int | None = None) -> bool:
    """Whether a kernel can write rows of E4M3 as it rounds: blocks, of `block` if given, are powers of two from 16."""
    wide = fmt.block if block is None else block
    powers = all(b is not None and not b & (b - 1) for b in (wide, fmt.block))
    fits = powers and wide is not None and wide >= 16 and x.shape[-1] % wide == 0 and takes_e4m3_rows(x.shape[-1])
    return fits and x.dtype in DTYPES and x.dim() <= 3 and x.numel() > 0 and has_e4m3(x.device)


def _aligned(x: Tensor, fmt: Format, write: Callable[[tuple[Tensor, Tensor]], Tensor]) -> tuple[Tensor, Tensor]:
    """What a kernel of transforms writes block by block, brought to one power of two a row."""
    assert fmt.block is not None
    payload, row_scales, inexact = _outputs(x)
    blocks = torch.empty((row_scales.numel(), x.shape[-1] // fmt.block), dtype=torch.uint8, device=x.device)
    write((payload, blocks))
    align_rows(payload.view(-1, x.shape[-1]), blocks, row_scales.view(-1), inexact, fmt)
    return payload, row_scales


def fake_quantize_e4m3(x: Tensor, format: str, axis: int = -1) -> tuple[Tensor, Tensor]:
    fmt = _format(format)
    if axis not in (-1, x.dim() - 1) or takes.fake_quantize(x, format) or not _folds(x, fmt):
        return _in_two("fake_quantize", x, format, axis)
    payload, row_scales, inexact = _outputs(x)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    rows_to_e4m3(rows, payload.view(rows.shape), row_scales.view(-1), inexact, fmt)
    return payload, row_scales


@if_it_fits
def transform_quantize_e4m3(
    x: Tensor, matrix: Tensor | None, format: str, hadamard: bool = False
) -> tuple[Tensor, Tensor]:
    fmt, block = _format(format), None if matrix is None else matrix.shape[-1]
    if not _folds(x, fmt, block) or takes.transform_quantize(x, matrix, format):
        return _in_two("transform_quantize", x, matrix, format, hadamard)
    return _aligned(x, fmt, lambda e4m3: transform_triton(x, matrix, hadamard, fmt, e4m3=e4m3))


def hadamard_quantize_e4m3(x: Tensor, block: int, format: str) -> tuple[Tensor, Tensor]:
    return _in_two("hadamard_quantize", x, block, format)


@if_it_fits
def norm_quantize_e4m3(
    x: Tensor,
    weight: Tensor | None,
    matrix: Tensor | None,
    format: str,
    eps: float,
    offset: float = 0.0,
    gain_first: bool = False,
    hadamard: bool = False,
    added: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """`added` as in `cuda.norm_quantize`."""
    fmt, block = _format(format), None if matrix is None else matrix.shape[-1]
    if not _folds(x, fmt, block) or takes.norm_quantize(x, weight, matrix, format, eps):
        if added is not None:
            return NotImplemented
        return _in_two("norm_quantize", x, weight, matrix, format, eps, offset, gain_first, hadamard)
    if matrix is not None and matrix.dim() == 3:
        gain = (row_scales_of_norm(x, eps, added), weight, float(offset) if gain_first else 0.0)
        given = x if added is None else added[1]
        return _aligned(x, fmt, lambda e4m3: transform_triton(given, matrix, False, fmt, norm=gain, e4m3=e4m3))
    written = _outputs(x)
    norm_triton(x, weight, eps, offset, gain_first, matrix, hadamard, fmt, written, added=added)
    payload, row_scales, _ = written
    return payload, row_scales


@if_it_fits
def silu_mul_quantize_e4m3(
    gate: Tensor, up: Tensor, matrix: Tensor | None, format: str, hadamard: bool = False
) -> tuple[Tensor, Tensor]:
    fmt, block = _format(format), None if matrix is None else matrix.shape[-1]
    if not _folds(up, fmt, block) or takes.silu_mul_quantize(gate, up, matrix, format):
        return _in_two("silu_mul_quantize", gate, up, matrix, format, hadamard)
    return _aligned(up, fmt, lambda e4m3: transform_triton(up, matrix, hadamard, fmt, gate=gate, e4m3=e4m3))


def mx_linear_e4m3(
    payload: Tensor,
    row_scales: Tensor,
    codes: list[Tensor],
    scales: list[Tensor],
    biases: list[Tensor],
    format: str,
    dtype: torch.dtype,
    sums: str = "exact",
) -> Tensor:
    return _linear_e4m3((payload, row_scales), codes, scales, biases, None, format, dtype, sums)


def _linear_e4m3(
    e4m3: tuple[Tensor, Tensor],
    codes: list[Tensor],
    scales: list[Tensor],
    biases: list[Tensor],
    residual: Tensor | None,
    format: str,
    dtype: torch.dtype,
    sums: str,
) -> Tensor:
    """`residual + mx_linear_e4m3`."""
    (payload, row_scales), fmt, width = e4m3, _format(format), e4m3[0].shape[-1]
    count, channels = payload.shape[:-1].numel(), sum(c.shape[0] for c in codes)
    path = plan(fmt, None, False, count, width, channels, dtype, sums, *_sums_of(payload.device)).path
    if path is Path.DEFINITION or not _lie_packed(codes, scales, fmt, width):
        return NotImplemented
    rows, factors = payload.reshape(-1, width).contiguous(), row_scales.reshape(-1, 1).contiguous()
    out_shape = (*payload.shape[:-1], channels)
    if path in _FEW:
        out = _side_by_side(path, rows, codes, scales, biases, fmt, dtype, factors).view(out_shape)
        return out if residual is None else residual + out
    rest = None if residual is None else residual.reshape(count, -1).contiguous()
    return multiply_e4m3(rows, factors, codes, scales, biases, rest, fmt, dtype, path).view(out_shape)


def _sums_of(device: torch.device) -> tuple[bool, bool]:
    """What `plan` asks of a device."""
    return sums_in_float32(device), has_e4m3(device)


def _multiplying(name: str) -> Callable[..., Tensor]:
    """`<name>_linear`: of few rows codes meet codes; of some, values the codes; of more, rows of E4M3 an FP8 GEMM."""

    def run(
        codes: list[Tensor],
        scales: list[Tensor],
        biases: list[Tensor],
        residual: Tensor | None,
        weights: str,
        *operands: Any,
        added: tuple[Tensor, Tensor] | None = None,
        sums: str = "exact",
    ) -> Tensor:
        given = dict(zip(_OPERANDS[name], operands, strict=False))
        x, fmt, rounds = operands[0], _format(weights), _format(given["format"])
        rows, width, channels = x.shape[:-1].numel(), x.shape[-1], sum(c.shape[0] for c in codes)
        if residual is not None and (residual.shape != (*x.shape[:-1], channels) or residual.dtype != x.dtype):
            alone = run(codes, scales, biases, None, weights, *operands, added=added, sums=sums)
            return alone if alone is NotImplemented else residual + alone
        rest = (rows, width, channels, x.dtype, sums, *_sums_of(x.device))
        path = plan(fmt, rounds, True, *rest).path
        if path is Path.DEFINITION or not _lie_packed(codes, scales, fmt, width):
            return NotImplemented
        if path in (Path.INTEGERS, Path.INTEGER_TILES):
            found = integers(name, *operands, added=added)
            if found is not NotImplemented:
                out = torch.empty((*x.shape[:-1], channels), dtype=x.dtype, device=x.device)
                joined = None if residual is None else residual.reshape(rows, -1).contiguous()
                multiply = multiply_integers if path is Path.INTEGERS else multiply_integer_tiles
                multiply(found[0], found[1], codes, scales, biases, joined, fmt, out.view(rows, -1))
                return out
            path = plan(fmt, rounds, False, *rest).path
        if path in _FEW:
            # Rounded as they are, rows want no kernel that brings their blocks to one power of two.
            op = getattr(torch.ops.mxfx_kernels, name)
            y = op(*operands) if added is None else norm_quantize(*operands, added=added)
            if y is NotImplemented:
                return y
            out = _side_by_side(path, y.reshape(rows, width).contiguous(), codes, scales, biases, fmt, y.dtype)
            out = out.view(*x.shape[:-1], -1)
            return out if residual is None else residual + out
        op = getattr(torch.ops.mxfx_kernels, f"{name}_e4m3")
        e4m3 = op(*operands) if added is None else norm_quantize_e4m3(*operands, added=added)
        if e4m3 is NotImplemented:
            return e4m3
        return _linear_e4m3(e4m3, codes, scales, biases, residual, weights, x.dtype, sums)

    return run


def _side_by_side(
    path: Path,
    rows: Tensor,
    codes: list[Tensor],
    scales: list[Tensor],
    biases: list[Tensor],
    fmt: Format,
    dtype: torch.dtype,
    factors: Tensor | None = None,
) -> Tensor:
    """Each weight's product in its part of one result, (m, Σ n)."""
    channels = [c.shape[0] for c in codes]
    out = torch.empty((rows.shape[0], sum(channels)), dtype=dtype, device=rows.device)
    given: list[Tensor | None] = [*biases] or [None] * len(codes)
    multiply = multiply_rows if path is Path.CODES else multiply_some_rows
    for c, s, bias, part in zip(codes, scales, given, out.split(channels, -1), strict=True):
        multiply(rows, c, s, bias, fmt, part, factors)
    return out


_OPERANDS = {q.name().partition("::")[2]: [a.name for a in q._schema.arguments] for q in ROUNDING}
fake_quantize_linear = _multiplying("fake_quantize")
transform_quantize_linear = _multiplying("transform_quantize")
hadamard_quantize_linear = _multiplying("hadamard_quantize")
norm_quantize_linear = _multiplying("norm_quantize")
silu_mul_quantize_linear = _multiplying("silu_mul_quantize")


def add_norm_quantize_linear(
    codes: list[Tensor],
    scales: list[Tensor],
    biases: list[Tensor],
    branch: Tensor,
    weights: str,
    x: Tensor,
    *operands: Any,
    sums: str = "exact",
) -> tuple[Tensor, Tensor]:
    """The kernel that reads a row for its norm also adds and writes it; where none takes it, the sum is made before."""
    if x.numel() == 0 or branch.shape != x.shape or branch.dtype != x.dtype:
        return NotImplemented
    given, out = (codes, scales, biases, None, weights), NotImplemented
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if takes.norm_quantize(x, *operands) is None:
        out = norm_quantize_linear(*given, x, *operands, added=(branch, total), sums=sums)
    if out is NotImplemented:
        total = x + branch
        out = norm_quantize_linear(*given, total, *operands, sums=sums)
    return NotImplemented if out is NotImplemented else (total, out)


@if_it_fits
def integers(name: str, *operands: Any, added: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """What a quantizer gives of few rows, as `multiply_integers` takes it: int8 (m, k), uint8 (m, k / block).

    `added` as in `cuda.norm_quantize`.
    """
    given = dict(zip(_OPERANDS[name], operands, strict=False))
    x, fmt, matrix = operands[0], _format(given["format"]), given.get("matrix")
    block = None if matrix is None else matrix.shape[-1]
    if name == "hadamard_quantize" or not _folds(x, fmt, block) or getattr(takes, name)(*operands):
        return NotImplemented
    if given.get("axis", -1) not in (-1, x.dim() - 1):
        return NotImplemented
    assert fmt.block is not None
    rows, width = x.numel() // x.shape[-1], x.shape[-1]
    codes = torch.empty((*x.shape[:-1], width), dtype=torch.int8, device=x.device)
    units = torch.empty((rows, width // fmt.block), dtype=torch.uint8, device=x.device)
    written = (codes, units, inexact_rows(x.device))
    signs = bool(given.get("hadamard", False))
    if name == "norm_quantize":
        weight, eps = given["weight"], given["eps"]
        offset, gain_first = given.get("offset", 0.0), given.get("gain_first", False)
        if matrix is not None and matrix.dim() == 3:
            factors = eps
            if x.numel() > FACTORS_INSIDE:
                factors = row_scales_of_norm(x, eps, added)
                x, added = x if added is None else added[1], None
            gain = (factors, weight, float(offset) if gain_first else 0.0)
            transform_triton(x, matrix, False, fmt, norm=gain, integers=written, added=added)
        else:
            norm_triton(x, weight, eps, offset, gain_first, matrix, signs, fmt, integers=written, added=added)
    elif name == "silu_mul_quantize":
        transform_triton(given["up"], matrix, signs, fmt, gate=x, integers=written)
    else:
        transform_triton(x, matrix, signs, fmt, integers=written)
    return codes.view(rows, width), units
