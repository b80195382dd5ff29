"""What the kernels take; the definitions take the rest. Needs no Triton."""

from __future__ import annotations

import importlib.util
from functools import lru_cache

import torch
from torch import Tensor

from mxfx.algorithms.hadamard import DENSE_ORDER, has_hadamard, kronecker_orders
from mxfx.formats import E8M0, Format
from mxfx.formats.element import FloatElement

#: Orders of the package fast-hadamard-transform.
FAST_HADAMARD = (8, 32768)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_BLOCK = 4096
MAX_TRANSFORM = DENSE_ORDER
#: A norm holds a row in registers.
MAX_ROW = 16384
#: Rows that meet packed codes in ordinary arithmetic, and on tensor cores; from there on expanding the weight pays.
FEW_ROWS = 2
SOME_ROWS = 16
#: Rows of codes that meet packed codes in integer arithmetic, four products at an instruction; and on tensor cores,
#: where blocks are long enough and results somewhat more than inputs (`paths`).
FEW_INTEGERS = 8
INTEGER_ROWS = 16
#: What a row-wise FP8 GEMM asks of the sizes of its operands.
ALIGNED = 16
#: As many entries of a block as tensor cores multiply at least.
INTEGER_BLOCK = 32


@lru_cache(maxsize=1)
def has_triton() -> bool:
    """Whether kernels can be compiled here."""
    return importlib.util.find_spec("triton") is not None


@lru_cache(maxsize=256)
def takes_format(fmt: Format) -> bool:
    """Whether the kernels round onto a format: to nearest, by powers of two, and no element as wide as float32."""
    wide = isinstance(fmt.element, FloatElement) and fmt.element.exponent_bits == 8
    fits = fmt.rounding == "rn" and isinstance(fmt.scale, E8M0)
    return fits and not wide and (fmt.block is None or fmt.block <= MAX_BLOCK)


def takes_transform(x: Tensor, matrix: Tensor | None, fmt: Format | None) -> bool:
    """Whether one kernel can transform `x` and round the result onto `fmt`; only shapes are read."""
    shape, block = x.shape, None if fmt is None else fmt.block
    if matrix is not None:
        of = matrix.shape
        block = of[-1]
        if len(of) == 4 and len(shape) != 4:
            return False
    if block is None or shape[-1] % block or block > MAX_TRANSFORM:
        return False
    if fmt is None or fmt.block == block:
        return fmt is None or takes_format(fmt)
    divides = fmt.block is not None and block % fmt.block == 0
    return takes_format(fmt) and divides and block & (block - 1) == 0


def takes_kronecker(x: Tensor, order: int, fmt: Format | None) -> bool:
    """Whether one kernel can take `x` through a Hadamard matrix of high order and round the result onto `fmt`."""
    if order <= DENSE_ORDER or x.shape[-1] % order or not has_hadamard(order):
        return False
    a, b = kronecker_orders(order)
    # The terms of a float32 row of 16384 do not fit the shared memory of a multiprocessor.
    if max(a, b) > MAX_TRANSFORM or (x.dtype == torch.float32 and _power(a) * _power(b) > MAX_ROW // 2):
        return False
    if fmt is None or fmt.block == b:
        return fmt is None or takes_format(fmt)
    return fmt.block is not None and b & (b - 1) == 0 and b % fmt.block == 0 and takes_format(fmt)


def takes_fast_hadamard(order: int) -> bool:
    """Whether the package fast-hadamard-transform is here and has an order."""
    low, high = FAST_HADAMARD
    return order & (order - 1) == 0 and low <= order <= high and has_fast_hadamard()


@lru_cache(maxsize=1)
def has_fast_hadamard() -> bool:
    return importlib.util.find_spec("fast_hadamard_transform") is not None


def takes_rope(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether one kernel can rotate all channels of `x`; only shapes and dtypes are read."""
    shape, angles = x.shape, cos.shape
    if len(shape) != 4 or len(angles) != 3 or angles != sin.shape or angles[1:] != shape[2:]:
        return False
    each = angles[0] == 1 or angles[0] == shape[0]
    return each and cos.dtype == sin.dtype == x.dtype and shape[-1] <= MAX_BLOCK


def takes_norm(x: Tensor, weight: Tensor | None, matrix: Tensor | None, fmt: Format) -> bool:
    """Whether one kernel, or two, can normalize `x`, transform and round it; only shapes and dtypes are read."""
    if not takes_transform(x, matrix, fmt) or (matrix is not None and matrix.dim() == 4):
        return False
    block = matrix.shape[-1] if matrix is not None and matrix.dim() == 2 else fmt.block or 32
    short = max(_power(-(-x.shape[-1] // block)), 16) * max(_power(block), 16) <= MAX_ROW
    return short and (weight is None or weight.dtype == x.dtype)


def takes_packed(fmt: Format, width: int) -> bool:
    """Whether kernels can expand weights `(…, width)` that are packed in a format: they take whole blocks."""
    block = fmt.block
    whole = block is not None and 2 <= block <= 128 and not block & (block - 1) and not width % block
    return whole and fmt.bits <= 8


def takes_few_rows(fmt: Format, rows: int) -> bool:
    """Whether kernels multiply so few rows with packed codes as they lie, words of 32 bits at a time."""
    return fmt.bits in (4, 8) and rows <= FEW_ROWS and fmt.block is not None and fmt.block * fmt.bits % 32 == 0


def takes_some_rows(fmt: Format, rows: int, dtype: torch.dtype) -> bool:
    """Whether tensor cores multiply so many rows with codes that are decoded as they arrive."""
    return fmt.bits in (4, 8) and rows <= SOME_ROWS and dtype != torch.float32


def takes_integers(weight: Format, x: Format, rows: int, width: int) -> bool:
    """Whether few rows of codes meet 4-bit integers as they lie: int8 holds all that a block of `x` may have."""
    if weight.block != x.block or not takes_packed(weight, width) or x.block is None:
        return False
    if rows > (INTEGER_ROWS if x.block >= INTEGER_BLOCK else min(FEW_INTEGERS, INTEGER_ROWS)):
        return False
    element = x.element
    if isinstance(element, FloatElement):
        holds = element.max_exponent - element.min_exponent + element.mantissa_bits <= 6
    else:
        holds = x.bits <= 7
    return holds and weight.bits == 4 and not isinstance(weight.element, FloatElement) and x.block % 16 == 0


def takes_e4m3_rows(width: int) -> bool:
    """Whether a kernel can fold rows of that length into E4M3: it holds one in registers."""
    return width <= MAX_ROW


def _power(n: int) -> int:
    """The least power of two that is no less than `n`."""
    return 1 << (n - 1).bit_length()
