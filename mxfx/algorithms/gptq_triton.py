"""The block solver as one CUDA kernel (`solve_block` in `block_solver` says what it computes).

One program takes a tile of rows through every candidate exponent: the whole block lives in registers, each
column is taken out by a masked sum, rounded, and its residual subtracted from the columns after it. Rounding
adds and subtracts 1.5·2^p, which is exact to-nearest-even and the same on every device; nothing is divided,
because Triton's float32 division is approximate.

Importable only where `triton` is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxfx.formats import Element, FloatElement, IntElement

_TILE_ROWS = 32
_FLOAT32_MANTISSA = 23


def solve_block_triton(
    columns: Tensor, exponents: Tensor, feedback: Tensor, precision: Tensor, element: Element
) -> tuple[Tensor, Tensor, Tensor]:
    """Values, residual and exponents of one block; arguments as for `solve_block`, float32 on a CUDA device.

    Raises:
        TypeError: an element type that the kernel does not know.
    """
    groups, b, rows = columns.shape
    candidates = exponents.shape[1]
    columns, exponents = columns.contiguous(), exponents.contiguous()
    feedback, precision = feedback.contiguous(), precision.contiguous()
    values, residual = torch.empty_like(columns), torch.empty_like(columns)
    chosen = torch.empty(groups, rows, dtype=torch.int32, device=columns.device)
    low, high, min_binade, magic = _grid_constants(element)
    padded = max(triton.next_power_of_2(b), 16)
    grid = (triton.cdiv(rows, _TILE_ROWS), groups)
    _solve_block_kernel[grid](
        columns,
        exponents,
        feedback,
        precision,
        values,
        residual,
        chosen,
        rows,
        b,
        candidates,
        low,
        high,
        min_binade,
        magic,
        FLOAT=isinstance(element, FloatElement),
        B=padded,
        TILE=_TILE_ROWS,
        num_warps=1 if padded <= 32 else 4,
    )
    return values, residual, chosen


def _grid_constants(element: Element) -> tuple[float, float, float, float]:
    """Smallest and largest value, smallest normal binade, rounding constant relative to the binade."""
    if isinstance(element, IntElement):
        return element.min_value, element.max_value, 1.0, 1.5 * 2.0**_FLOAT32_MANTISSA
    if isinstance(element, FloatElement):
        spacing = 1.5 * 2.0 ** (_FLOAT32_MANTISSA - element.mantissa_bits)
        return -element.max_value, element.max_value, 2.0**element.min_exponent, spacing
    raise TypeError(f"the GPTQ kernel rounds integer and float elements, not {type(element).__name__}")


@triton.jit
def _power_of_two(exponent):  # type: ignore[no-untyped-def]
    """2**exponent for an int32 exponent in [-126, 127], by its bits: exact, unlike exp2."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _round(x, low, high, min_binade, magic, FLOAT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Nearest element, ties to even, saturating."""
    x = tl.minimum(tl.maximum(x, low), high)
    if FLOAT:
        binade = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        shift = tl.maximum(binade, min_binade) * magic
    else:
        shift = magic
    return (x + shift) - shift


@triton.jit
def _solve_block_kernel(  # type: ignore[no-untyped-def]
    columns_ptr,
    exponents_ptr,
    feedback_ptr,
    precision_ptr,
    values_ptr,
    residual_ptr,
    chosen_ptr,
    rows,
    b,
    candidates,
    low,
    high,
    min_binade,
    magic,
    FLOAT: tl.constexpr,
    B: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program a (row tile, group); all tensors contiguous, shaped as `solve_block` says."""
    group = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    column = tl.arange(0, B)
    in_rows = row < rows
    in_block = column < b
    offsets = group * b * rows + column[:, None].to(tl.int64) * rows + row[None, :]
    inside = in_block[:, None] & in_rows[None, :]

    original = tl.load(columns_ptr + offsets, mask=inside, other=0.0)
    weight = tl.load(precision_ptr + group * b + column, mask=in_block, other=0.0)
    exponent_row = exponents_ptr + group * candidates * rows + row
    first = tl.load(exponent_row, mask=in_rows, other=0)

    best_loss = tl.full((TILE,), float("inf"), dtype=tl.float32)
    best_values = tl.zeros((B, TILE), dtype=tl.float32)
    best_residual = tl.zeros((B, TILE), dtype=tl.float32)
    best_exponent = first
    for candidate in range(candidates):
        exponent = tl.load(exponent_row + candidate * rows, mask=in_rows, other=0)
        work = original * _power_of_two(-exponent)[None, :]
        residual = tl.zeros((B, TILE), dtype=tl.float32)
        for j in range(b):
            here = column[:, None] == j
            current = tl.sum(tl.where(here, work, 0.0), axis=0)
            rounded = _round(current, low, high, min_binade, magic, FLOAT)
            error = current - rounded
            feed = tl.load(feedback_ptr + (group * b + j) * b + column, mask=in_block & (column > j), other=0.0)
            work = tl.where(here, rounded[None, :], work - feed[:, None] * error[None, :])
            residual = tl.where(here, error[None, :], residual)
        # In units of the first candidate's scale: candidates lie within a few powers of two of each other.
        relative = tl.minimum(tl.maximum(2 * (exponent - first), -126), 126)
        loss = tl.sum(residual * residual * weight[:, None], axis=0) * _power_of_two(relative)
        better = (loss < best_loss) | (candidate == 0)
        scale = _power_of_two(exponent)
        best_values = tl.where(better[None, :], work * scale[None, :], best_values)
        best_residual = tl.where(better[None, :], residual * scale[None, :], best_residual)
        best_exponent = tl.where(better, exponent, best_exponent)
        best_loss = tl.where(better, loss, best_loss)

    tl.store(values_ptr + offsets, best_values, mask=inside)
    tl.store(residual_ptr + offsets, best_residual, mask=inside)
    tl.store(chosen_ptr + group * rows + row, best_exponent, mask=in_rows)
