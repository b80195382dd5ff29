"""Which way a product with a stored weight goes, by how many rows there are, in words, and why no other.

What is said here is what `packed_cuda` and `cpu` choose from the same limits; a test asks them. Needs no device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from mxfx.formats import Format
from mxfx.ops import fp8
from mxfx.ops.kernels import limits
from mxfx.ops.kernels.library import load_cpu
from mxfx.ops.kernels.limits import takes_e4m3_rows, takes_few_rows, takes_integers, takes_packed, takes_some_rows
from mxfx.ops.kernels.structs import fits_byte, units_of

#: What a row-wise FP8 GEMM asks of the sizes of its operands.
ALIGNED = 16

INTEGERS = "codes meet codes in integers"
CODES = "codes as they lie, in float32"
TENSOR_CORES = "codes decoded on their way to tensor cores"
EXACT = "FP8 tensor cores, exact sums"
FAST = "FP8 tensor cores, cuBLAS's sums"
STEP = f"in a step {INTEGERS}"
CHOSEN = "the experts that tokens chose, decoded"

#: Up to so many rows (None: all that are more), and how they are multiplied.
Way = tuple[int | None, str]


@dataclass(frozen=True)
class Product:
    """A product of rows of `width` with a weight.

    Attributes:
        weight: format of packed codes; None for a weight that is held as numbers.
        input: format that the rows are rounded onto right before; None where they are not.
        channels: results of this weight and those that stand side by side with it.
        dtype: of the rows and the results.
        sums: of `multiply-in-fp8`; None for a product that it did not take.
        fused: one op rounds the rows and multiplies them.
        experts: the weight is a stack, of which each row reads some.
    """

    weight: Format | None
    input: Format | None
    width: int
    channels: int
    dtype: torch.dtype
    sums: str | None = None
    fused: bool = False
    experts: bool = False


def no_fp8(weight: Format, x: Format | None, width: int, channels: int) -> str | None:
    """Why FP8 tensor cores do not take a product of these formats and sizes; None if they do."""
    if x is None:
        return "its input is read unrounded"
    for name, fmt in (("input", x), ("weight", weight)):
        if (why := fp8.not_carried(fmt)) is not None:
            return f"its {name} is {fmt}, {why}"
    if not takes_packed(weight, width) or not takes_e4m3_rows(width):
        return f"no kernel expands rows of {width} in {weight} to E4M3"
    if width % ALIGNED or channels % ALIGNED:
        return f"an FP8 GEMM takes sizes that are multiples of {ALIGNED}; the weight is {channels} × {width}"
    return None


def summed(sums: str, weight: Format, x: Format) -> str:
    """How sums that are asked for are taken of two formats: "wide" where exact ones are not."""
    return "wide" if sums == "exact" and not fp8.sums_exactly(x, weight) else sums


def ways_on_cuda(product: Product, exact_sums: bool = True) -> list[Way]:
    """`exact_sums`: whether the device adds FP8 products in float32 (`e4m3_product.sums_in_float32`)."""
    return _merged(lambda rows: _on_cuda(product, rows, exact_sums), _thresholds())


def ways_on_cpu(product: Product) -> list[Way]:
    """Rows of a step: one token of so many texts."""
    weight, x = product.weight, product.input
    most = _wide(product)
    if weight is None or product.experts or x is None:
        return [(None, most)]
    if load_cpu() is not None or units_of(str(weight)) is None or not fits_byte(x):
        return [(None, most)]
    from mxfx.ops.kernels.cpu import few_rows

    few = few_rows(str(weight), product.dtype)
    return [*([(few, STEP)] if few else []), (None, most)]


def _thresholds() -> list[int]:
    """The last numbers of rows before a choice can change."""
    return sorted({limits.FEW_ROWS, limits.FEW_INTEGERS, limits.SOME_ROWS, limits.INTEGER_ROWS})


def _merged(way: Callable[[int], str], thresholds: list[int]) -> list[Way]:
    found: list[Way] = []
    for last in [*thresholds, None]:
        how = way(thresholds[-1] + 1 if last is None else last)
        if found and found[-1][1] == how:
            found.pop()
        found.append((last, how))
    return found


def _on_cuda(product: Product, rows: int, exact_sums: bool) -> str:
    weight, dtype = product.weight, product.dtype
    if weight is None or not takes_packed(weight, product.width):
        return _wide(product)
    if product.experts:
        return CHOSEN
    x = product.input if product.fused and _pays(product, rows) else None
    if x is not None and takes_integers(weight, x, rows, product.width):
        return INTEGERS
    if takes_few_rows(weight, rows):
        return CODES
    if takes_some_rows(weight, rows, dtype):
        return TENSOR_CORES
    if product.sums == "fast":
        return FAST
    return EXACT if product.sums == "exact" and exact_sums else _wide(product)


def _pays(product: Product, rows: int) -> bool:
    """As `packed_cuda._multiplying` finds it."""
    assert product.weight is not None
    few = rows <= limits.FEW_INTEGERS or (product.weight.block or 0) < limits.INTEGER_BLOCK
    return few or product.width < product.channels <= 2 * product.width


def _wide(product: Product) -> str:
    dtype = str(product.dtype).removeprefix("torch.")
    return f"a GEMM in {dtype}" + ("" if product.weight is None else ", the weight decoded before")


def said(ways: list[Way]) -> Iterator[str]:
    """`1 to 8 rows: …`, one a way."""
    first = 1
    for last, how in ways:
        if last is None:
            yield how if first == 1 else f"from {first} rows: {how}"
        else:
            yield f"{first} to {last} rows: {how}" if last > first else f"{first} row: {how}"
            first = last + 1
