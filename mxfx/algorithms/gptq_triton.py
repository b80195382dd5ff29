"""The block solver as one CUDA kernel (`solve_block` in `block_solver` says what it computes).

One program takes a tile of rows through every candidate exponent: the whole block lives in registers, each
column is taken out by a masked sum, rounded, and its residual subtracted from the columns after it. Rounding
adds and subtracts 1.5·2^p, which is exact to-nearest-even and the same on every device; nothing is divided,
because Triton's float32 division is approximate.

Importable only where `triton` is.
"""

from __future__ import annotations

from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor

from mxfx.algorithms.block_solver import search_constants
from mxfx.algorithms.launch import KEPT_SHAPES, Launch
from mxfx.formats import Element, FloatElement, IntElement
from mxfx.formats.e8m0 import SEARCH_LIMIT, SEARCHED

_TILE_ROWS = 32
_FLOAT32_MANTISSA = 23


def solve_block_triton(
    columns: Tensor,
    exponents: Tensor | None,
    feedback: Tensor,
    precision: Tensor,
    element: Element,
    values: Tensor,
    residual: Tensor,
    chosen: Tensor,
) -> None:
    """Values, residual and exponents of one block; arguments as for `solve_block`, float32 on a CUDA device.

    Raises:
        TypeError: an element type that the kernel does not know.
    """
    groups, b, rows = columns.shape
    # Without candidates the pointer is never read.
    candidates = columns if exponents is None else exponents
    inputs = [x if x.stride(-1) == 1 else x.contiguous() for x in (columns, candidates, feedback, precision)]
    tensors = (*inputs, values, residual, chosen)
    strides = tuple(x.stride()[:-1] for x in tensors)
    count = None if exponents is None else exponents.shape[1]
    # Elements are frozen dataclasses, which their protocol cannot say.
    _launch(groups, b, rows, count, strides, element)(*tensors)  # type: ignore[arg-type]


@lru_cache(maxsize=KEPT_SHAPES)
def _launch(groups: int, b: int, rows: int, candidates: int | None, strides: tuple, element: Element) -> Launch:
    tiles = triton.cdiv(rows, _TILE_ROWS)
    padded = max(triton.next_power_of_2(b), 16)
    flat = [stride for of_one in strides for stride in of_one]
    limits = (*_grid_constants(element), *search_constants(element))
    scalars = (tiles, rows, b, SEARCHED if candidates is None else candidates, *flat, *limits)
    constants = {
        "SEARCH": candidates is None,
        "FLOAT": isinstance(element, FloatElement),
        "LIMIT": SEARCH_LIMIT,
        "B": padded,
        "TILE": _TILE_ROWS,
    }
    return Launch(_solve_block_kernel, lambda _: tiles * groups, scalars, constants, num_warps=1 if padded <= 32 else 4)


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
    tiles,
    rows,
    b,
    candidates,
    columns_group,
    columns_stride,
    exponents_group,
    exponents_stride,
    feedback_group,
    feedback_stride,
    precision_group,
    values_group,
    values_stride,
    residual_group,
    residual_stride,
    chosen_group,
    low,
    high,
    min_binade,
    magic,
    carry,
    offset,
    SEARCH: tl.constexpr,
    FLOAT: tl.constexpr,
    LIMIT: tl.constexpr,
    B: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program a (group, row tile); tensors shaped as `solve_block` says, rows side by side."""
    group = (tl.program_id(0) // tiles).to(tl.int64)
    row = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    column = tl.arange(0, B)
    in_rows = row < rows
    in_block = column < b
    inside = in_block[:, None] & in_rows[None, :]
    lines = column[:, None].to(tl.int64)

    place = group * columns_group + lines * columns_stride + row[None, :]
    original = tl.load(columns_ptr + place, mask=inside, other=0.0)
    weight = tl.load(precision_ptr + group * precision_group + column, mask=in_block, other=0.0)
    exponent_row = exponents_ptr + group * exponents_group + row
    if SEARCH:
        bits = tl.max(tl.abs(original), axis=0).to(tl.int32, bitcast=True)
        largest = ((bits + carry) >> 23) - offset
        first = tl.minimum(tl.maximum(largest, -LIMIT), LIMIT)
    else:
        largest = tl.zeros((TILE,), dtype=tl.int32)
        first = tl.load(exponent_row, mask=in_rows, other=0)

    best_loss = tl.full((TILE,), float("inf"), dtype=tl.float32)
    best_values = tl.zeros((B, TILE), dtype=tl.float32)
    best_residual = tl.zeros((B, TILE), dtype=tl.float32)
    best_exponent = first
    for candidate in range(candidates):
        if SEARCH:
            exponent = tl.minimum(tl.maximum(largest - candidate, -LIMIT), LIMIT)
        else:
            exponent = tl.load(exponent_row + candidate * exponents_stride, mask=in_rows, other=0)
        work = original * _power_of_two(-exponent)[None, :]
        residual = tl.zeros((B, TILE), dtype=tl.float32)
        for j in range(b):
            here = column[:, None] == j
            current = tl.sum(tl.where(here, work, 0.0), axis=0)
            rounded = _round(current, low, high, min_binade, magic, FLOAT)
            error = current - rounded
            feedback_row = feedback_ptr + group * feedback_group + j * feedback_stride
            feed = tl.load(feedback_row + column, mask=in_block & (column > j), other=0.0)
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

    tl.store(values_ptr + group * values_group + lines * values_stride + row[None, :], best_values, mask=inside)
    tl.store(residual_ptr + group * residual_group + lines * residual_stride + row[None, :], best_residual, mask=inside)
    tl.store(chosen_ptr + group * chosen_group + row, best_exponent, mask=in_rows)
