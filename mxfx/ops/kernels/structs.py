"""What the C kernels are told: formats, what stands before a quantizer, tensors of a cache. No kernel runs here."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from torch import Tensor

from mxfx.formats import E8M0, Format, parse
from mxfx.formats.e8m0 import FLOAT32_PRECISION, ScaleRule, error_bits
from mxfx.formats.element import FloatElement, IntElement
from mxfx.formats.format import precisions
from mxfx.formats.stored import _table
from mxfx.ops.kernels.limits import takes_format

_RULES = (ScaleRule.FLOOR, ScaleRule.RCEIL, ScaleRule.EVEN, ScaleRule.CEIL, ScaleRule.MSE)
DTYPES = (torch.float32, torch.bfloat16)

_P, _L, _I, _F, _D = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float, ctypes.c_double


class Rule(ctypes.Structure):
    """``format`` of rows.c."""

    _fields_ = (
        *((name, _I) for name in ("is_float", "block", "rule", "emax", "mantissa", "emin", "exact")),
        *((name, _F) for name in ("largest", "least", "fraction")),
        ("unit", _D),
    )


class Before(ctypes.Structure):
    """``before`` of rows.c."""

    _fields_ = (
        *((name, _P) for name in ("gain", "up", "cos", "sin", "matrix")),
        *((name, _F) for name in ("eps", "offset")),
        *((name, _I) for name in ("norm", "gain_first", "gain_bf16", "matrix_bf16")),
        *((name, _L) for name in ("order", "blocks", "heads", "group", "turns", "angles")),
    )


class CacheTensor(ctypes.Structure):
    """``cache`` of products.c."""

    _fields_ = (
        *((name, _P) for name in ("codes", "scales")),
        *((name, _L) for name in ("batch", "head", "row", "scales_batch", "scales_head", "scales_row", "width")),
        *((name, _P) for name in ("table", "rule")),
        *((name, _I) for name in ("bits", "ebits")),
    )


@lru_cache(maxsize=256)
def refused(text: str) -> str | None:
    """Why the kernels do not round onto a format; None if they do."""
    fmt = parse(text)
    return None if takes_format(fmt) and fmt.block is not None else f"the C kernels do not round onto {text}"


def why_not_cached(dtype: torch.dtype, own: torch.dtype, format: str | None) -> str | None:
    """Why ``attend_token`` does not take keys or values of dtype ``own`` for queries of ``dtype``; None if it does."""
    if dtype not in DTYPES or own != dtype:
        return f"attends in {dtype}, with keys or values in {own}"
    if format is None:
        return None
    bits = table_of(format)[2]
    return refused(format) or (None if bits in (4, 8) else f"reads codes of 4 or 8 bits, not the {bits} of {format}")


def is_byte_mask(allowed: Tensor, batch: int, places: int) -> bool:
    """Whether a mask is one byte a place, for one text or for all: C asks for neither."""
    rows = allowed.shape[0]
    return allowed.dtype is torch.bool and rows in (1, batch) and allowed.numel() == rows * places


#: Kept for good, as the tables below are: C, and steps that were recorded, hold their addresses.
@cache
def _rule(text: str, dtype: torch.dtype) -> Rule:
    fmt = parse(text)
    element, block = fmt.element, fmt.block
    assert block is not None
    bits, unit = error_bits(element, block, precisions()[dtype])
    exact = bits <= FLOAT32_PRECISION
    floats = isinstance(element, FloatElement)
    return Rule(
        floats,
        block,
        _RULES.index(ScaleRule(str(fmt.rule))),
        element.max_exponent,
        element.mantissa_bits,
        element.min_exponent if isinstance(element, FloatElement) else 0,
        exact,
        element.max_value,
        element.min_value if isinstance(element, IntElement) else -element.max_value,
        math.frexp(element.max_value)[0],
        1 / unit if exact else 2.0 ** (62 - math.ceil(math.log2(block)) - 2 * element.max_exponent - 1),
    )


@cache
def rule_of(text: str, dtype: torch.dtype) -> int:
    """Address of a format for numbers of a dtype."""
    return ctypes.addressof(_rule(text, dtype))


@dataclass(frozen=True)
class Units:
    """The 16 elements of a format of 4 bits as integers, in units of ``2 ** exponent``; ``most`` bounds them."""

    table: ctypes.Array
    most: int
    exponent: int


@lru_cache(maxsize=64)
def units_of(text: str) -> Units | None:
    """The elements of a format as integers of a byte; None where they do not fit, or are not of 4 bits."""
    fmt = parse(text)
    if fmt.bits != 4 or fmt.block is None or fmt.block % 2 or not isinstance(fmt.scale, E8M0):
        return None
    values = fmt.element.from_codes(fmt.unpack(torch.arange(16, dtype=torch.uint8).view(-1, 1), 1), torch.float32)
    exponent = least_exponent(fmt)
    scaled = [round(v * 2.0**-exponent) for v in values.flatten().tolist()]
    most = max(abs(v) for v in scaled)
    return None if most > 64 else Units((ctypes.c_int8 * 16)(*scaled), most, exponent)


def least_exponent(fmt: Format) -> int:
    """The exponent of the distance of two neighbours next to zero."""
    element = fmt.element
    return element.min_exponent - element.mantissa_bits if isinstance(element, FloatElement) else 0


def fits_byte(fmt: Format) -> bool:
    """Whether the elements of a format are integers of a byte, in some unit."""
    return (
        fmt.block is not None
        and isinstance(fmt.scale, E8M0)
        and fmt.element.max_value * 2.0 ** -least_exponent(fmt) < 128
    )


@cache
def table_of(text: str) -> tuple[Tensor, int, int, int]:
    """What a byte of codes stands for, float32, kept; its address, bits of a code, exponent bits (0: integers)."""
    fmt = parse(text)
    table = _table(fmt, torch.float32, torch.device("cpu"))
    return table, table.data_ptr(), fmt.bits, fmt.element.exponent_bits if isinstance(fmt.element, FloatElement) else 0
