"""Which way a product with a stored weight goes, by how many rows there are, in words, and why no other.

What is said here of CUDA is what `paths` plans and `packed_cuda` does; of a CPU, what `cpu` chooses from the same
limits. Needs no device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from mxfx.formats import Format
from mxfx.ops import fp8
from mxfx.ops.kernels import limits
from mxfx.ops.kernels.library import load_cpu
from mxfx.ops.kernels.limits import ALIGNED, takes_e4m3_rows, takes_packed
from mxfx.ops.kernels.paths import Path, Plan, plan
from mxfx.ops.kernels.structs import fits_byte, units_of

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


_SAID = {
    Path.INTEGERS: INTEGERS,
    Path.INTEGER_TILES: INTEGERS,
    Path.CODES: CODES,
    Path.TENSOR_CORES: TENSOR_CORES,
    Path.EXACT: EXACT,
    Path.FAST: FAST,
}


def _on_cuda(product: Product, rows: int, exact_sums: bool) -> str:
    weight = product.weight
    if weight is None or (product.experts and not takes_packed(weight, product.width)):
        return _wide(product)
    if product.experts:
        return CHOSEN
    return _SAID.get(_planned(product, weight, rows, exact_sums).path, _wide(product))


def _planned(product: Product, weight: Format, rows: int, exact_sums: bool) -> Plan:
    sizes = (rows, product.width, product.channels)
    return plan(weight, product.input, product.fused, *sizes, product.dtype, product.sums, exact_sums)


def why_not_fp8(product: Product, exact_sums: bool) -> str:
    """Why many rows of a product that `multiply-in-fp8` took do not run on FP8 tensor cores; empty where they do."""
    if product.weight is None or product.sums is None or product.experts:
        return ""
    found = _planned(product, product.weight, _thresholds()[-1] + 1, exact_sums)
    return "" if found.path in (Path.EXACT, Path.FAST) else found.reason


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
