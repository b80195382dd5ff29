"""The ops on a CPU by C kernels: one call of the host where a definition takes dozens.

Rounding is bit-equal to the definition, for any number of rows. What sums (norms, transforms, products, attention) is
taken only of steps of decoding, one token a text: a library too sums those in another order than a whole prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from ctypes import byref
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from mxfx.formats import parse
from mxfx.formats.stored import require_length, restore
from mxfx.ops import packed
from mxfx.ops.fused import _transformed
from mxfx.ops.kernels import structs, takes
from mxfx.ops.kernels.build import library
from mxfx.ops.kernels.calls import called
from mxfx.ops.kernels.crossing import rows_of
from mxfx.ops.kernels.library import _LIBRARY, kernel
from mxfx.ops.kernels.structs import DTYPES, Before, CacheTensor, refused, rule_of, table_of, units_of
from mxfx.ops.norm import rms_norm
from mxfx.ops.rope import rope as rotate
from mxfx.ops.transform import misfit

#: Texts whose next tokens are taken together row by row; more fill a GEMM.
FEW = 16
#: Numbers below which a second thread costs more than it saves.
_SERIAL = 1 << 15
#: What ``Before`` says where there is no transform, and where nothing is turned.
_NO_MATRIX: Mapping[str, Any] = {"heads": 1, "group": 1}
_ONE_TURN: Mapping[str, Any] = {"turns": 1, "angles": 1}
_C = library()
if isinstance(_C, str):
    raise ImportError(_C)


def _few(x: Tensor) -> bool:
    """A step of decoding: one token of few texts."""
    return x.dim() > 1 and x.shape[-2] == 1 and x.shape[0] <= FEW


def _threads(work: int) -> int:
    return 1 if work < _SERIAL else torch.get_num_threads()


def _run(x: Tensor, format: str | None, before: Before | None, *others: Tensor | None) -> Tensor:
    """``mxfx_rows`` on a contiguous tensor; ``others`` are those that ``before`` points to."""
    y, width = torch.empty_like(x), x.shape[-1]
    if x.numel() == 0:
        return y
    arguments = (
        *(x.data_ptr(), y.data_ptr(), x.numel() // width, width, x.dtype is torch.bfloat16),
        None if before is None else byref(before),
        None if format is None else rule_of(format, x.dtype),
        _threads(x.numel()),
    )
    if called(_C.mxfx_rows, arguments, (x, *others), y):
        raise MemoryError("no memory for a row of a tensor")
    return y


def _matrix(x: Tensor, matrix: Tensor | None) -> Mapping[str, Any] | None:
    """What ``Before`` says of a transform; None if it is not taken, as one that does not fit: C does not ask."""
    if matrix is None:
        return _NO_MATRIX
    if matrix.dtype not in DTYPES or not matrix.is_contiguous() or misfit(x, matrix) is not None:
        return None
    shape = matrix.shape
    heads = shape[0] if len(shape) == 4 else 1
    group = x.shape[1] // heads if len(shape) == 4 else 1
    blocks = shape[-3] if len(shape) > 2 else 0
    of_matrix = {"matrix": matrix.data_ptr(), "matrix_bf16": matrix.dtype is torch.bfloat16}
    return of_matrix | {"order": shape[-1], "blocks": blocks, "heads": heads, "group": group}


def _taken(*tensors: Tensor | None) -> bool:
    return all(t is None or (t.dtype is tensors[0].dtype and t.is_contiguous()) for t in tensors)


@lru_cache(maxsize=256)
def _block(format: str) -> int:
    return parse(format).block or 0


def takes_rounding(x: Tensor, format: str, axis: int = -1) -> str | None:
    """Why a quantizer stays with its definition."""
    if x.dtype not in DTYPES:
        return f"numbers are {x.dtype}"
    if x.dim() == 0:
        return "a scalar has no blocks"
    return refused(format) if axis in (-1, x.dim() - 1) else f"blocks run along axis {axis}, not the last"


@kernel("fake_quantize", "cpu", takes=takes_rounding, name="c-fake-quantize")
def fake_quantize(x: Tensor, format: str, axis: int = -1) -> Tensor:
    return _run(x.contiguous(), format, None)


def takes_transform(x: Tensor, matrix: Tensor) -> str | None:
    return None if x.dtype in DTYPES else f"numbers are {x.dtype}"


@kernel("block_transform", "cpu", takes=takes_transform, name="c-block-transform")
def block_transform(x: Tensor, matrix: Tensor) -> Tensor:
    found = _matrix(x, matrix)
    if not _few(x) or found is None:
        return NotImplemented
    return _run(x.contiguous(), None, Before(**found, **_ONE_TURN), matrix)


def takes_rope(x: Tensor, cos: Tensor, sin: Tensor) -> str | None:
    return takes.rope(x, cos, sin) if x.dtype in DTYPES else f"numbers are {x.dtype}"


@kernel("rope", "cpu", takes=takes_rope, name="c-rope")
def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _turned(x, cos, sin, None, None)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, matrix: Tensor | None, format: str | None) -> Tensor:
    """One token a text: rows are (batch, heads), those of the angles (batch | 1)."""
    found = _matrix(x, matrix)
    if not _few(x) or found is None or not _taken(x, cos, sin):
        return NotImplemented
    before = Before(cos=cos.data_ptr(), sin=sin.data_ptr(), turns=x.shape[1], angles=cos.shape[0], **found)
    return _run(x, format, before, cos, sin, matrix)


def takes_rope_quantize(
    x: Tensor, cos: Tensor, sin: Tensor, matrix: Tensor | None, format: str, hadamard: bool = False
) -> str | None:
    return takes_rounding(x, format) or takes_rope(x, cos, sin)


@kernel("rope_quantize", "cpu", takes=takes_rope_quantize, name="c-rope-quantize")
def rope_quantize(
    x: Tensor, cos: Tensor, sin: Tensor, matrix: Tensor | None, format: str, hadamard: bool = False
) -> Tensor:
    out = _turned(x, cos, sin, matrix, format)
    return fake_quantize(_transformed(rotate(x, cos, sin), matrix), format) if out is NotImplemented else out


def takes_transform_quantize(x: Tensor, matrix: Tensor | None, format: str, hadamard: bool = False) -> str | None:
    return takes_rounding(x, format)


@kernel("transform_quantize", "cpu", takes=takes_transform_quantize, name="c-transform-quantize")
def transform_quantize(x: Tensor, matrix: Tensor | None, format: str, hadamard: bool = False) -> Tensor:
    found = _matrix(x, matrix)
    if not _few(x) or found is None:
        return fake_quantize(_transformed(x, matrix), format)
    return _run(x.contiguous(), format, Before(**found, **_ONE_TURN), matrix)


def takes_norm(
    x: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0, gain_first: bool = False
) -> str | None:
    if x.dtype not in DTYPES:
        return f"numbers are {x.dtype}"
    same = weight is None or (weight.dtype == x.dtype and weight.shape == x.shape[-1:])
    return None if same else f"the gain is {weight.dtype} {tuple(weight.shape)}, numbers are {x.dtype} {tuple(x.shape)}"


@kernel("rms_norm", "cpu", takes=takes_norm, name="c-norm")
def norm(x: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0, gain_first: bool = False) -> Tensor:
    if not _few(x) or not _taken(x, weight):
        return NotImplemented
    return _normalized(x, weight, None, None, _NO_MATRIX, eps, offset, gain_first)


def _normalized(
    x: Tensor,
    weight: Tensor | None,
    matrix: Tensor | None,
    format: str | None,
    found: Mapping[str, Any],
    eps: float,
    offset: float,
    gain_first: bool,
) -> Tensor:
    before = Before(
        gain=None if weight is None else weight.data_ptr(),
        eps=eps,
        offset=offset,
        norm=1,
        gain_first=gain_first,
        gain_bf16=x.dtype is torch.bfloat16,
        **found,
        **_ONE_TURN,
    )
    return _run(x, format, before, weight, matrix)


def takes_norm_quantize(
    x: Tensor,
    weight: Tensor | None,
    matrix: Tensor | None,
    format: str,
    eps: float,
    offset: float = 0.0,
    gain_first: bool = False,
    hadamard: bool = False,
) -> str | None:
    return takes_norm(x, weight, eps) or takes_rounding(x, format)


@kernel("norm_quantize", "cpu", takes=takes_norm_quantize, name="c-norm-quantize")
def norm_quantize(
    x: Tensor,
    weight: Tensor | None,
    matrix: Tensor | None,
    format: str,
    eps: float,
    offset: float = 0.0,
    gain_first: bool = False,
    hadamard: bool = False,
) -> Tensor:
    found = _matrix(x, matrix)
    if not _few(x) or found is None or not _taken(x, weight):
        return fake_quantize(_transformed(rms_norm(x, weight, eps, offset, gain_first), matrix), format)
    return _normalized(x, weight, matrix, format, found, eps, offset, gain_first)


def takes_silu_mul_quantize(
    gate: Tensor, up: Tensor, matrix: Tensor | None, format: str, hadamard: bool = False
) -> str | None:
    return takes.unlike(gate, up) or takes_rounding(gate, format)


@kernel("silu_mul_quantize", "cpu", takes=takes_silu_mul_quantize, name="c-silu-mul-quantize")
def silu_mul_quantize(gate: Tensor, up: Tensor, matrix: Tensor | None, format: str, hadamard: bool = False) -> Tensor:
    found = _matrix(gate, matrix)
    if not _few(gate) or found is None or not _taken(gate, up):
        return fake_quantize(_transformed(F.silu(gate) * up, matrix), format)
    return _run(gate, format, Before(up=up.data_ptr(), **found, **_ONE_TURN), up, matrix)


def restored(codes: Tensor, scales: Tensor, format: str, width: int, dtype: torch.dtype) -> Tensor:
    """``mxfx.formats.stored.restore`` of a whole weight, to the bit."""
    fmt = parse(format)
    require_length(codes, scales, fmt, width)
    if dtype not in DTYPES or fmt.bits not in (4, 8) or fmt.block is None:
        return restore(codes, scales, fmt, width, dtype)
    y = torch.empty((*codes.shape[:-1], width), dtype=dtype)
    _, table, bits, _ = table_of(format)
    rows = y.numel() // max(width, 1)
    how = (rows, width, fmt.block, bits, table, dtype is torch.bfloat16, _threads(y.numel()))
    if _C.mxfx_restore(codes.data_ptr(), scales.data_ptr(), y.data_ptr(), *how):
        raise MemoryError("no memory for a row of a weight")
    return y


def mx_linear(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, format: str) -> Tensor:
    """``mxfx::mx_linear``: few rows on a grid of integers, as many as pay (``crossing``), meet codes; float64 sums."""
    if not (codes.is_contiguous() and scales.is_contiguous() and codes.dim() == 2):
        return packed.mx_linear(x, codes, scales, bias, format)
    of_codes = (codes.shape[0], -(-x.shape[-1] // (_block(format) or 1)))
    fit = 2 * codes.shape[1] == x.shape[-1] and scales.shape == of_codes
    fit = fit and (bias is None or bias.shape == codes.shape[:1])
    takes = fit and units_of(format) is not None and x.dtype in DTYPES and _taken(x, bias)
    if takes and x.dim() > 1 and x.shape[-2] == 1 and x.shape[0] <= few_rows(format, x.dtype):
        y = _by_codes(x, codes, scales, bias, format)
        if y is not None:
            return y
    return F.linear(x, restored(codes, scales, format, x.shape[-1], x.dtype), bias)


def few_rows(format: str, dtype: torch.dtype) -> int:
    """How many rows of a step of decoding meet codes of a format as they lie."""
    return rows_of(format, dtype, _measured_by_codes, _measured_decoded)


def _measured_by_codes(x: Tensor, codes: Tensor, scales: Tensor, format: str) -> Tensor:
    y = _by_codes(x, codes, scales, None, format)
    assert y is not None
    return y


def _measured_decoded(x: Tensor, codes: Tensor, scales: Tensor, format: str) -> Tensor:
    return F.linear(x, restored(codes, scales, format, x.shape[-1], x.dtype))


def _by_codes(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, format: str) -> Tensor | None:
    """Rows times codes; None for rows that lie on no grid of few integers."""
    units, width = units_of(format), x.shape[-1]
    assert units is not None
    y = x.new_empty((*x.shape[:-1], codes.shape[0]))
    arguments = (
        *(x.data_ptr(), codes.data_ptr(), scales.data_ptr(), None if bias is None else bias.data_ptr()),
        *(y.data_ptr(), x.numel() // width, width, codes.shape[0], _block(format), units.table),
        *(units.most, units.exponent, x.dtype is torch.bfloat16, torch.get_num_threads()),
    )
    return None if called(_C.mxfx_product, arguments, (x, codes, scales, bias), y) else y


_LIBRARY.impl("mx_linear", mx_linear, "CPU")


def attend_token(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    allowed: Tensor | None,
    slots: Tensor,
    scale: float,
    formats: tuple[str | None, str | None],
    softcap: float | None,
    sinks: Tensor | None,
    writes: bool,
) -> Tensor:
    """One token a text: ``k`` and ``v`` to their place, then ``q`` over all places, codes read as they lie.

    The operands are those of ``mxfx.ops.cache.cached_attend``. ``NotImplemented`` for what it does not take.
    """
    keys, values, *scales = tensors
    plain = type(q) is Tensor and not torch.compiler.is_compiling() and not _get_current_dispatch_mode_stack()
    both = ((k, formats[0]), (v, formats[1]))
    masked = allowed is None or structs.is_byte_mask(allowed, q.shape[0], keys.shape[2])
    if (
        not plain
        or not masked
        or any(structs.why_not_cached(q.dtype, x.dtype, format) is not None for x, format in both)
    ):
        return NotImplemented
    caches = []
    for cache, own, x, format in zip((keys, values), scales, (k, v), formats, strict=True):
        if cache.stride(3) != 1 or (format is None and cache.dtype != q.dtype):
            return NotImplemented
        of_format = (None, None, 0, 0)
        if format is not None:
            if own is None or own.stride(3) != 1:
                return NotImplemented
            _, *of_table = table_of(format)
            of_format = (of_table[0], rule_of(format, q.dtype), *of_table[1:])
        size = cache.element_size()
        strides = (stride * size for stride in cache.stride()[:3])
        own_strides = (0, 0, 0) if own is None else own.stride()[:3]
        caches.append(
            CacheTensor(
                *(cache.data_ptr(), None if own is None else own.data_ptr()),
                *(*strides, *own_strides, x.shape[-1], *of_format),
            )
        )
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    if sinks is not None:
        sinks = sinks.to(q.dtype).contiguous()
    if allowed is not None:
        allowed = allowed.contiguous()
    batch, heads, kv_heads = q.shape[0], q.shape[1], k.shape[1]
    y = q.new_empty((*q.shape[:-1], v.shape[-1]))
    arguments = (
        *(q.data_ptr(), k.data_ptr(), v.data_ptr(), y.data_ptr(), slots.data_ptr()),
        None if allowed is None else allowed.data_ptr(),
        0 if allowed is None or allowed.shape[0] == 1 else keys.shape[2],
        *(byref(caches[0]), byref(caches[1]), None if sinks is None else sinks.data_ptr()),
        *(batch, heads, kv_heads, keys.shape[2], scale, softcap or 0.0, writes),
        *(q.dtype is torch.bfloat16, torch.get_num_threads()),
    )
    reads = (q, k, v, slots, allowed, sinks, *tensors)
    if called(_C.mxfx_attend, arguments, reads, y):
        raise MemoryError("no memory for the scores of a token")
    return y
