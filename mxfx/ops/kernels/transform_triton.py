"""Block transform, alone or with `fake_quantize` behind it and SiLU·up before it, in one pass over memory.

A tile is (rows, block): rows of one block column, multiplied by that column's matrix on the tensor cores with
float32 accumulation. Products are exact or nearly: a Hadamard matrix is used by its signs and scaled after; a
bfloat16 `x` meets the matrix as a sum of two bfloat16 terms (relative error 2^-17 of each entry, far under the
2^-9 of the result); other dtypes use three tf32 terms.

Importable only where `triton` is.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxfx.formats import Format, parse
from mxfx.ops.kernels.addressing import Rows, as_rows, is_walkable
from mxfx.ops.kernels.launch import KEPT_SHAPES, Launch
from mxfx.ops.kernels.quantize_triton import row_offset
from mxfx.ops.kernels.rounding_triton import grid_constants, quantize_tile

TILE_ELEMENTS = 4096
MIN_ROWS = 64
ELEMENTS_PER_THREAD = 32
STAGES = 2
#: With blocks as wide as this, two programs fit a multiprocessor only if each has this many registers a thread,
#: and, where the matrix has two terms, one tile at a time in shared memory.
WIDE = 128
REGISTERS_OF_WIDE = 128


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
    if out.numel() == 0:
        return out
    if not is_walkable(x):
        x = x.contiguous()
    if gate is not None and gate.stride() != x.stride():
        x, gate = x.contiguous(), gate.contiguous()
    if matrix is not None:
        matrix = matrix.contiguous()
    kind = None if matrix is None else matrix.shape
    launch = _launch(x.shape, x.stride(), x.dtype, x.device, kind, signs, fmt, gate is not None)
    launch(x, x if gate is None else gate, x if matrix is None else matrix, out)
    return out


@lru_cache(maxsize=KEPT_SHAPES)
def _launch(
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    matrix: tuple[int, ...] | None,
    signs: bool,
    fmt: Format | None,
    gated: bool,
) -> Launch:
    rows = as_rows(shape, stride)
    block = matrix[-1] if matrix is not None else fmt.block if fmt else None
    assert block is not None, "a transform needs a matrix or a format with blocks"
    own = matrix is not None and len(matrix) == 3
    columns = rows.length // block
    if not own and rows.flat:
        rows, columns = Rows(block, rows.count * columns, (1, 1, rows.count * columns), (0, 0, block)), 1
    padded = triton.next_power_of_2(block) if matrix is None else max(triton.next_power_of_2(block), 16)
    tile = max(TILE_ELEMENTS // padded, MIN_ROWS if matrix is not None else 1)
    tiles = triton.cdiv(rows.count, tile)
    return Launch(
        _transform_kernel,
        # Each keeps one matrix and takes many tiles.
        lambda at_a_time: columns * min(max(at_a_time // columns, 1), tiles),
        (rows.count, columns, block * block if own else 0, *rows.arguments),
        {
            "SCALE": block**-0.5,
            "TILE": tile,
            "B": block,
            "PADDED": padded,
            "FORMAT_BLOCK": padded if fmt is None or fmt.block == block else fmt.block,
            "TRANSFORM": matrix is not None,
            "SIGNS": signs,
            "SILU": gated,
            "QUANTIZE": fmt is not None,
            "STAGES": 1 if padded >= WIDE and not signs else STAGES,
            **grid_constants(fmt or parse("mxint8@32"), dtype),
        },
        tasks=columns * tiles,
        num_warps=max(1, tile * padded // (32 * ELEMENTS_PER_THREAD)),
        maxnreg=REGISTERS_OF_WIDE if padded >= WIDE else None,
    )


@triton.jit
def load_matrix(matrix_ptr, B: tl.constexpr, PADDED: tl.constexpr, SIGNS: tl.constexpr, NARROW: tl.constexpr):
    """Two (PADDED, PADDED) terms that `multiply` takes, zero outside the block; of a Hadamard matrix the signs."""
    line = tl.arange(0, PADDED)
    inside = (line < B)[:, None] & (line < B)[None, :]
    matrix = tl.load(matrix_ptr + line[:, None] * B + line[None, :], mask=inside, other=0.0).to(tl.float32)
    if SIGNS:
        matrix = tl.where(matrix > 0, 1.0, tl.where(matrix < 0, -1.0, 0.0))
        high = matrix.to(NARROW)
        low = high
    elif tl.bfloat16 == NARROW:
        high = matrix.to(NARROW)
        low = (matrix - high.to(tl.float32)).to(NARROW)
    else:
        high = matrix
        low = matrix
    return high, low


@triton.jit
def multiply(x, high, low, SCALE: tl.constexpr, SIGNS: tl.constexpr):
    """`x` (rows, PADDED), of its own dtype, times the matrix of `load_matrix`; float32."""
    if SIGNS and x.dtype != tl.float32:
        product = tl.dot(x, high) * SCALE
    elif SIGNS:
        product = tl.dot(x, high, input_precision="tf32x3") * SCALE
    elif x.dtype == tl.bfloat16:
        product = tl.dot(x, high, tl.dot(x, low))
    else:
        product = tl.dot(x.to(tl.float32), high, input_precision="tf32x3")
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


@triton.jit(do_not_specialize=["turns"])
def _transform_kernel(
    x_ptr,
    gate_ptr,
    matrix_ptr,
    y_ptr,
    rows,
    columns,
    matrix_stride,
    size1,
    size2,
    stride0,
    stride1,
    stride2,
    turns,
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
        start = matrix_ptr + column.to(tl.int64) * matrix_stride
        high, low = load_matrix(start, B, PADDED, SIGNS, x_ptr.dtype.element_ty)
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
            y = multiply(x, high, low, SCALE, SIGNS).to(x_ptr.dtype.element_ty).to(tl.float32)
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
