"""``mxfx_kernels::grouped_product``: rows sorted by group, each group times a matrix of its own.

The one product under ``mxfx::expert_linear``. Registered with the dispatcher directly, so that it costs the host no
checks and is one node to ``torch.export`` and ``torch.compile``: how many rows a group has is data.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("mxfx_kernels", "FRAGMENT")
_NAME = "mxfx_kernels::grouped_product"
#: Bytes to which the strides of `torch._grouped_mm`'s operands must be aligned.
_ALIGNED = 16


def _by_loop(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """One product for each group that has rows."""
    result = rows.new_zeros(rows.shape[0], weight.shape[1])
    for group, (start, stop) in _spans(ends):
        torch.mm(rows[start:stop], weight[group].mT, out=result[start:stop])
    return result


def _on_cuda(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    if _grouped_gemm_takes(rows, weight):
        return torch._grouped_mm(rows.contiguous(), weight.mT, offs=ends)
    _need_counts(rows)
    return _by_loop(rows, weight, ends)


def _weight_gradient(grad: Tensor, rows: Tensor, ends: Tensor, groups: int) -> Tensor:
    """``gradᵀ rows`` of each group, ``(groups, out, in)``."""
    if rows.is_cuda and _grouped_gemm_takes(rows, grad):
        return torch._grouped_mm(grad.mT, rows.contiguous(), offs=ends)
    _need_counts(rows)
    result = rows.new_zeros(groups, grad.shape[1], rows.shape[1])
    for group, (start, stop) in _spans(ends):
        torch.mm(grad[start:stop].mT, rows[start:stop], out=result[group])
    return result


def _spans(ends: Tensor) -> list[tuple[int, tuple[int, int]]]:
    """Group and row range of every group that has rows; waits for the device once."""
    bounds = pairwise([0, *ends.tolist()])
    return [(group, span) for group, span in enumerate(bounds) if span[0] < span[1]]


def _grouped_gemm_takes(rows: Tensor, other: Tensor) -> bool:
    widths = (rows.shape[-1], *other.shape[-2:]) if other.dim() == 3 else (rows.shape[-1], other.shape[-1])
    aligned = all(width * rows.element_size() % _ALIGNED == 0 for width in widths)
    return rows.dtype == other.dtype == torch.bfloat16 and aligned


def _need_counts(rows: Tensor) -> None:
    if rows.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"a grouped product of {rows.dtype} rows of {rows.shape[-1]} channels needs the sizes of the groups on the "
            "host, which a recorded CUDA graph cannot have; run the model in bfloat16, with widths in multiples of 8"
        )


def _fake(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    rows, weight, ends = ctx.saved_tensors
    grad = grad.contiguous()
    of_rows = grouped_product(grad, weight.mT, ends) if ctx.needs_input_grad[0] else None
    of_weight = _weight_gradient(grad, rows, ends, len(weight)) if ctx.needs_input_grad[1] else None
    return of_rows, of_weight, None


_LIBRARY.define(
    "grouped_product(Tensor rows, Tensor weight, Tensor ends) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)
_LIBRARY.impl("grouped_product", _by_loop, "CompositeExplicitAutograd")
_LIBRARY.impl("grouped_product", _on_cuda, "CUDA")
torch.library.register_fake(_NAME, _fake, lib=_LIBRARY)
torch.library.register_autograd(_NAME, _backward, setup_context=_save, lib=_LIBRARY)


def grouped_product(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """``rows[i] @ weight[g].mT`` for every row ``i`` of group ``g``.

    ``rows`` is ``(rows, in)``, sorted by group; ``weight`` ``(groups, out, in)`` of any strides; ``ends`` int32
    ``(groups,)``, the row behind the last one of each group, the last of them ``rows``. Returns ``(rows, out)``. CPUs
    and float32 run a product for each group that has rows; CUDA in bfloat16 one grouped GEMM.
    """
    result: Tensor = torch.ops.mxfx_kernels.grouped_product(rows, weight, ends)
    return result
