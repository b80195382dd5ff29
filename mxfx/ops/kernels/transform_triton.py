"""Block transform, alone or with `fake_quantize` behind it and SiLU·up before it, in one pass over memory.

A tile is (rows, block): rows of one block column, multiplied by that column's matrix on the tensor cores with
float32 accumulation. Products are exact or nearly: a Hadamard matrix is used by its signs and scaled after; a
bfloat16 `x` meets the matrix as a sum of two bfloat16 terms (relative error 2^-17 of each entry, far under the
2^-9 of the result); other dtypes use three tf32 terms.

Importable only where `triton` is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxfx.formats import Format, parse
from mxfx.ops.kernels.addressing import Rows, as_rows, multiprocessors, on_device_of
from mxfx.ops.kernels.quantize_triton import row_offset
from mxfx.ops.kernels.rounding_triton import grid_constants, quantize_tile

TILE_ELEMENTS = 4096
MIN_ROWS = 64
ELEMENTS_PER_THREAD = 32
PROGRAMS_PER_MULTIPROCESSOR = 8
STAGES = 2


def transform_triton(
    x: Tensor,
    matrix: Tensor | None,
    signs: bool = False,
    fmt: Format | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """`x_B @ matrix` per block, then `fmt`; contiguous, same shape and dtype as `x`.

    Args:
        x: (..., n); bfloat16, float16 or float32. With `gate` it is the `up` of `silu(gate) * up`.
        matrix: (b, b) for all blocks or (n / b, b, b); None transforms nothing and takes blocks from `fmt`.
        signs: every entry of `matrix` is ±1/√b; only the signs are read.
        fmt: rounds the result (after it is rounded to x's dtype); its block divides b. None leaves it.
        gate: like `x`, or None.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return out
    if gate is not None and gate.stride() != x.stride():
        x, gate = x.contiguous(), gate.contiguous()
    rows = as_rows(x)
    if gate is not None and rows.tensor is not x:
        gate = gate.contiguous()
    block = matrix.shape[-1] if matrix is not None else fmt.block if fmt else None
    assert block is not None, "a transform needs a matrix or a format with blocks"
    shared = matrix is None or matrix.dim() == 2
    columns = rows.length // block
    if shared and rows.flat:
        rows, columns = Rows(rows.tensor, block, rows.count * columns, (1, 1, rows.count * columns), (0, 0, block)), 1
    _launch(rows, gate, matrix, out, columns, block, signs, fmt)
    return out


def _launch(
    rows: Rows,
    gate: Tensor | None,
    matrix: Tensor | None,
    out: Tensor,
    columns: int,
    block: int,
    signs: bool,
    fmt: Format | None,
) -> None:
    padded = triton.next_power_of_2(block) if matrix is None else max(triton.next_power_of_2(block), 16)
    tile = max(TILE_ELEMENTS // padded, MIN_ROWS if matrix is not None else 1)
    tiles = triton.cdiv(rows.count, tile)
    wanted = multiprocessors(out) * PROGRAMS_PER_MULTIPROCESSOR
    programs = min(max(wanted // columns, 1), tiles)
    with on_device_of(out):
        _transform_kernel[(programs * columns,)](
            rows.tensor,
            rows.tensor if gate is None else gate,
            rows.tensor if matrix is None else matrix.contiguous(),
            out,
            rows.count,
            columns,
            triton.cdiv(tiles, programs),
            block * block if matrix is not None and matrix.dim() == 3 else 0,
            *rows.arguments,
            SCALE=block**-0.5,
            TILE=tile,
            B=block,
            PADDED=padded,
            FORMAT_BLOCK=padded if fmt is None or fmt.block == block else fmt.block,
            TRANSFORM=matrix is not None,
            SIGNS=signs,
            SILU=gate is not None,
            QUANTIZE=fmt is not None,
            STAGES=STAGES,
            **grid_constants(fmt or parse("mxint8@32"), out.dtype),
            num_warps=max(1, tile * padded // (32 * ELEMENTS_PER_THREAD)),
        )


@triton.jit
def load_matrix(matrix_ptr, B: tl.constexpr, PADDED: tl.constexpr, SIGNS: tl.constexpr):
    """(PADDED, PADDED) float32, zero outside the block; only the signs if `SIGNS`."""
    line = tl.arange(0, PADDED)
    inside = (line < B)[:, None] & (line < B)[None, :]
    matrix = tl.load(matrix_ptr + line[:, None] * B + line[None, :], mask=inside, other=0.0).to(tl.float32)
    if SIGNS:
        matrix = tl.where(matrix > 0, 1.0, tl.where(matrix < 0, -1.0, 0.0))
    return matrix


@triton.jit
def multiply(x, matrix, SCALE: tl.constexpr, SIGNS: tl.constexpr):
    """`x @ matrix` in float32 for a tile of x's own dtype."""
    if SIGNS and x.dtype != tl.float32:
        product = tl.dot(x, matrix.to(x.dtype))
    elif x.dtype == tl.bfloat16:
        high = matrix.to(tl.bfloat16)
        low = (matrix - high.to(tl.float32)).to(tl.bfloat16)
        product = tl.dot(x, high, tl.dot(x, low))
    else:
        product = tl.dot(x.to(tl.float32), matrix, input_precision="tf32x3")
    if SIGNS:
        product = product * SCALE
    return product


@triton.jit
def silu_times(gate, up):
    """`silu(gate) * up` in float32, silu rounded to the dtype as the two separate ops do."""
    wide = gate.to(tl.float32)
    silu = wide / (1.0 + tl.exp(-wide))
    return silu.to(gate.dtype).to(tl.float32) * up.to(tl.float32)


@triton.jit
def quantize_blocks(
    x,
    TILE: tl.constexpr,
    PADDED: tl.constexpr,
    FORMAT_BLOCK: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    MIN_BINADE: tl.constexpr,
    MAGIC: tl.constexpr,
    OFFSET: tl.constexpr,
    THRESHOLD: tl.constexpr,
    CLAMP: tl.constexpr,
    LARGEST: tl.constexpr,
    FLOAT: tl.constexpr,
    MSE: tl.constexpr,
    SUM: tl.constexpr,
    UNIT: tl.constexpr,
):
    """`quantize_tile` of a (TILE, PADDED) tile whose rows hold one or several blocks of the format."""
    if FORMAT_BLOCK != PADDED:
        x = tl.reshape(x, (TILE * (PADDED // FORMAT_BLOCK), FORMAT_BLOCK))
    y = quantize_tile(x, LOW, HIGH, MIN_BINADE, MAGIC, OFFSET, THRESHOLD, CLAMP, LARGEST, FLOAT, MSE, SUM, UNIT)
    if FORMAT_BLOCK != PADDED:
        y = tl.reshape(y, (TILE, PADDED))
    return y


@triton.jit
def _transform_kernel(
    x_ptr,
    gate_ptr,
    matrix_ptr,
    y_ptr,
    rows,
    columns,
    turns,
    matrix_stride,
    size1,
    size2,
    stride0,
    stride1,
    stride2,
    SCALE: tl.constexpr,
    TILE: tl.constexpr,
    B: tl.constexpr,
    PADDED: tl.constexpr,
    FORMAT_BLOCK: tl.constexpr,
    TRANSFORM: tl.constexpr,
    SIGNS: tl.constexpr,
    SILU: tl.constexpr,
    QUANTIZE: tl.constexpr,
    STAGES: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    MIN_BINADE: tl.constexpr,
    MAGIC: tl.constexpr,
    OFFSET: tl.constexpr,
    THRESHOLD: tl.constexpr,
    CLAMP: tl.constexpr,
    LARGEST: tl.constexpr,
    FLOAT: tl.constexpr,
    MSE: tl.constexpr,
    SUM: tl.constexpr,
    UNIT: tl.constexpr,
):
    """A program keeps the matrix of one block column and walks down that column's tiles."""
    column = tl.program_id(0) % columns
    lane = tl.arange(0, PADDED)
    if TRANSFORM:
        matrix = load_matrix(matrix_ptr + column.to(tl.int64) * matrix_stride, B, PADDED, SIGNS)
    first = tl.program_id(0) // columns
    step = tl.num_programs(0) // columns
    for turn in tl.range(0, turns, num_stages=STAGES):
        row = (first + turn * step) * TILE + tl.arange(0, TILE)
        inside = (row < rows)[:, None]
        if PADDED != B:
            inside = inside & (lane < B)[None, :]
        source = (row_offset(row, size1, size2, stride0, stride1, stride2) + column * B)[:, None] + lane[None, :]
        x = tl.load(x_ptr + source, mask=inside, other=0.0)
        if SILU:
            gate = tl.load(gate_ptr + source, mask=inside, other=0.0)
            x = silu_times(gate, x).to(x_ptr.dtype.element_ty)
        if TRANSFORM:
            y = multiply(x, matrix, SCALE, SIGNS).to(x_ptr.dtype.element_ty).to(tl.float32)
        else:
            y = x.to(tl.float32)
        if QUANTIZE:
            y = quantize_blocks(
                y,
                TILE,
                PADDED,
                FORMAT_BLOCK,
                LOW,
                HIGH,
                MIN_BINADE,
                MAGIC,
                OFFSET,
                THRESHOLD,
                CLAMP,
                LARGEST,
                FLOAT,
                MSE,
                SUM,
                UNIT,
            )
        target = (row.to(tl.int64) * (columns * B) + column * B)[:, None] + lane[None, :]
        tl.store(y_ptr + target, y.to(y_ptr.dtype.element_ty), mask=inside)
