"""RMSNorm, a block transform shared by all blocks, and `fake_quantize`, in one pass over memory.

Where every block has a matrix of its own, one program cannot hold them all: then `row_scales` reads the rows once for
what the norm divides by, and the kernel of transforms does the rest in a second pass.

Importable only where `triton` is.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxfx.algorithms.launch import KEPT_SHAPES, Launch
from mxfx.formats import Format
from mxfx.ops.fp8 import octaves_of
from mxfx.ops.kernels.activation_triton import load_sum
from mxfx.ops.kernels.addressing import alike, as_rows, is_walkable
from mxfx.ops.kernels.early_triton import STEP_ROWS, starts_early, wait
from mxfx.ops.kernels.fp8_triton import as_power, in_units, power_below, span_of, too_far
from mxfx.ops.kernels.integer_triton import Integers, blocks_to_integers, count_lost, place
from mxfx.ops.kernels.matrix_triton import load_matrix, multiply, quantize_blocks, terms_of
from mxfx.ops.kernels.packed_triton import to_e4m3
from mxfx.ops.kernels.quantize_triton import row_offset
from mxfx.ops.kernels.rounding_triton import as_stored, grid_of

ELEMENTS_PER_THREAD = 16
STAGES = 2
SCALES_ELEMENTS = 4096
SCALES_PER_THREAD = 32


def norm_triton(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    offset: float,
    gain_first: bool,
    matrix: Tensor | None,
    signs: bool,
    fmt: Format | None,
    e4m3: tuple[Tensor, Tensor, Tensor] | None = None,
    integers: Integers | None = None,
    added: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`rms_norm`, then `matrix` (b, b) on each block, then `fmt`; contiguous, shape and dtype of `x`.

    `x` is (..., hidden), bfloat16, float16 or float32; each of `matrix` and `fmt` may be None, the block of
    `fmt` divides b, and b divides hidden. With `e4m3`, which is what `rows_to_e4m3` writes to, or
    `integers`, as `integer_triton` takes them, the result is put there. `added`: what is added to `x` first, and where
    to put the sum, contiguous; both like `x`.
    """
    written = e4m3 or integers
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if written is None else written[0]
    if out.numel() == 0:
        return out
    x, branch, total = _summands(x, added)
    block = matrix.shape[-1] if matrix is not None else fmt.block if fmt and fmt.block else 32
    gain = "none" if weight is None else "first" if gain_first else "last"
    terms = 0 if matrix is None else terms_of(matrix.dtype, x.dtype, signs)
    launch = _launch(
        x.shape, x.stride(), x.dtype, x.device, block, terms, signs, gain, float(offset), eps, fmt, added is not None
    )
    rest = (out, out) if written is None else written[1:]
    given = (x if weight is None else weight.contiguous(), x if matrix is None else matrix.contiguous())
    launch(x, *given, out, *rest, branch, total)
    return out


def row_scales(x: Tensor, eps: float, added: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """`rsqrt(mean(x²) + eps)` over the last axis: float32 of `x.shape[:-1]`; x is (..., hidden) and not empty.

    `added` is that of `norm_triton`.
    """
    out = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    x, branch, total = _summands(x, added)
    _launch_scales(x.shape, x.stride(), x.device, eps, added is not None)(x, out, branch, total)
    return out


def _summands(x: Tensor, added: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
    """x as a kernel walks it, what is added to it, and where the sum goes; x itself for those that are not there."""
    if added is not None:
        return *alike(x, added[0]), added[1]
    x = x if is_walkable(x) else x.contiguous()
    return x, x, x


@lru_cache(maxsize=KEPT_SHAPES)
def _launch_scales(
    shape: tuple[int, ...], stride: tuple[int, ...], device: torch.device, eps: float, added: bool
) -> Launch:
    rows = as_rows(shape, stride)
    padded = triton.next_power_of_2(rows.length)
    # Few rows are done soonest by many threads each.
    few = rows.count <= STEP_ROWS
    tile, each = (1, SCALES_PER_THREAD // 4) if few else (max(SCALES_ELEMENTS // padded, 1), SCALES_PER_THREAD)
    early = starts_early(device, rows.count)
    return Launch(
        _scales_kernel,
        lambda at_a_time: triton.cdiv(rows.count, tile),
        (rows.count, rows.length, eps, *rows.arguments),
        {"TILE": tile, "PADDED": padded, "ADDED": added, "EARLY": early},
        num_warps=min(max(1, tile * padded // (32 * each)), 16),
        launch_pdl=early,
    )


@triton.jit
def _scales_kernel(
    x_ptr,
    y_ptr,
    branch_ptr,
    total_ptr,
    rows,
    length,
    eps,
    size1,
    size2,
    stride0,
    stride1,
    stride2,
    TILE: tl.constexpr,
    PADDED: tl.constexpr,
    ADDED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program, `TILE` rows."""
    wait(EARLY)
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    lane = tl.arange(0, PADDED)
    inside = (row < rows)[:, None] & (lane < length)[None, :]
    start = row_offset(row, size1, size2, stride0, stride1, stride2)
    x = load_sum(x_ptr, branch_ptr, start[:, None] + lane[None, :], inside, ADDED)
    if ADDED:
        tl.store(total_ptr + (row.to(tl.int64) * length)[:, None] + lane[None, :], x, mask=inside)
    x = x.to(tl.float32)
    tl.store(y_ptr + row, tl.rsqrt(tl.sum(x * x, axis=1) / length + eps), mask=row < rows)


@lru_cache(maxsize=KEPT_SHAPES)
def _launch(
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    block: int,
    terms: int,
    signs: bool,
    gain: str,
    offset: float,
    eps: float,
    fmt: Format | None,
    added: bool = False,
) -> Launch:
    rows = as_rows(shape, stride)
    padded, blocks = triton.next_power_of_2(block), triton.next_power_of_2(triton.cdiv(rows.length, block))
    if terms:
        padded, blocks = max(padded, 16), max(blocks, 16)
    early = starts_early(device, rows.count)
    return Launch(
        _norm_kernel,
        lambda at_a_time: min(rows.count, at_a_time),
        (rows.count, rows.length, eps, *rows.arguments),
        {
            "GAIN_OFFSET": offset,
            "SCALE": block**-0.5,
            "TILE": blocks,
            "B": block,
            "PADDED": padded,
            "FORMAT_BLOCK": padded if fmt is None or fmt.block == block else fmt.block,
            "GAIN": gain != "none",
            "GAIN_FIRST": gain == "first",
            "SIGNS": signs,
            "TERMS": terms,
            "ADDED": added,
            "STAGES": STAGES,
            "OCTAVES": fmt and fmt.block and octaves_of(fmt),
            "GRID": fmt and grid_of(fmt, dtype),
            "EARLY": early,
        },
        tasks=rows.count,
        num_warps=min(max(blocks * padded // (32 * ELEMENTS_PER_THREAD), 1), 16),
        launch_pdl=early,
    )


@triton.jit(do_not_specialize=["turns"])
def _norm_kernel(
    x_ptr,
    weight_ptr,
    matrix_ptr,
    y_ptr,
    scales_ptr,
    inexact_ptr,
    branch_ptr,
    total_ptr,
    rows,
    length,
    eps,
    size1,
    size2,
    stride0,
    stride1,
    stride2,
    turns,
    GAIN_OFFSET: tl.constexpr,
    SCALE: tl.constexpr,
    TILE: tl.constexpr,
    B: tl.constexpr,
    PADDED: tl.constexpr,
    FORMAT_BLOCK: tl.constexpr,
    GAIN: tl.constexpr,
    GAIN_FIRST: tl.constexpr,
    SIGNS: tl.constexpr,
    TERMS: tl.constexpr,
    ADDED: tl.constexpr,
    STAGES: tl.constexpr,
    OCTAVES: tl.constexpr,
    GRID: tl.constexpr,
    EARLY: tl.constexpr,
):
    """A program takes one row at a time as (blocks, block); weight and matrix stay in registers."""
    wait(EARLY)
    narrow = x_ptr.dtype.element_ty
    lane = tl.arange(0, PADDED)
    column = tl.arange(0, TILE)[:, None] * B + lane[None, :]
    inside = (lane < B)[None, :] & (column < length)
    if TERMS > 0:
        high, low = load_matrix(matrix_ptr, None, B, PADDED, SIGNS, TERMS, narrow)
    if GAIN:
        gain = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
        if GAIN_FIRST:
            gain += GAIN_OFFSET
    for turn in tl.range(0, turns, num_stages=STAGES):
        row = tl.program_id(0) + turn * tl.num_programs(0)
        here = inside & (row < rows)
        start = row_offset(row, size1, size2, stride0, stride1, stride2)
        x = load_sum(x_ptr, branch_ptr, start + column, here, ADDED)
        if ADDED:
            tl.store(total_ptr + row.to(tl.int64) * length + column, x, mask=here)
        x = x.to(tl.float32)
        mean = tl.sum(tl.sum(x * x, axis=1), axis=0) / length
        y = x * tl.rsqrt(mean + eps)
        if GAIN:
            if not GAIN_FIRST:
                y = as_stored(y, narrow)
            y = y * gain
        if TERMS > 0:
            y = multiply(y.to(narrow), high, low, SCALE, SIGNS, TERMS)
        y = as_stored(y, narrow)
        if GRID is not None and y_ptr.dtype.element_ty != tl.uint8:
            y = quantize_blocks(y, FORMAT_BLOCK, GRID, narrow)
        target = y_ptr + row.to(tl.int64) * length + column
        if y_ptr.dtype.element_ty == tl.uint8:
            blocks = tl.reshape(tl.where(here, y, 0.0), (TILE * PADDED // FORMAT_BLOCK, FORMAT_BLOCK))
            blocks, unit, scales = in_units(blocks, GRID, narrow)
            scale, depth = span_of(scales, 0)
            payload = to_e4m3(blocks * (unit * power_below(scale))[:, None])
            tl.store(target, tl.reshape(payload, (TILE, PADDED)), mask=here)
            tl.store(scales_ptr + row, as_power(scale), mask=row < rows)
            if too_far(scale, depth, OCTAVES) > 0:
                tl.atomic_add(inexact_ptr, tl.full([], 1, tl.int64))
        elif y_ptr.dtype.element_ty == tl.int8:
            y, unit, lost = blocks_to_integers(tl.where(here, y.to(tl.float32), 0.0), FORMAT_BLOCK)
            block = tl.arange(0, TILE)[:, None] * (B // FORMAT_BLOCK) + tl.arange(0, PADDED // FORMAT_BLOCK)[None, :]
            target = y_ptr + row.to(tl.int64) * length + tl.arange(0, TILE)[:, None] * B
            tl.store(target + place(lane, FORMAT_BLOCK)[None, :], y, mask=here)
            at = scales_ptr + row.to(tl.int64) * (length // FORMAT_BLOCK) + block
            tl.store(at, unit.to(tl.uint8), mask=(block * FORMAT_BLOCK < length) & (row < rows))
            count_lost(inexact_ptr, tl.reshape(tl.where(row < rows, lost, 0), (1, TILE * PADDED // FORMAT_BLOCK)))
        else:
            tl.store(target, y.to(narrow), mask=here)
