"""Large tensors in eager mode on a CPU, a cacheful of rows at a time.

Rounding is a dozen cheap passes over memory. On a whole weight matrix each of them would allocate, fault in
and evict a fresh tensor; on a chunk that stays in the cache the same operators run several times faster.
Blocks never span rows, so the result is the same to the bit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

ELEMENTS_PER_THREAD = 1 << 16


def fits_in_cache(x: Tensor) -> bool:
    """True for a tensor to take whole: small, on an accelerator, or recorded by a tracer or by autograd."""
    recorded = torch.compiler.is_compiling() or (x.requires_grad and torch.is_grad_enabled())
    plain = type(x) in (Tensor, torch.nn.Parameter)
    if recorded or not plain or x.device.type != "cpu" or _get_current_dispatch_mode_stack():
        return True
    return x.numel() <= 2 * _chunk_elements()


def map_rows(function: Callable[[Tensor], Tensor], x: Tensor, axis: int) -> Tensor:
    """`function`, which maps rows (m, n) to (m, n), applied to the rows of `x` that run along `axis`."""
    last = x.movedim(axis, -1)
    rows = last.reshape(-1, last.shape[-1])
    height = max(1, _chunk_elements() // rows.shape[-1])
    mapped = torch.empty_like(rows, memory_format=torch.contiguous_format)
    for source, target in zip(rows.split(height), mapped.split(height), strict=True):
        target.copy_(function(source))
    return mapped.view(last.shape).movedim(-1, axis)


def _chunk_elements() -> int:
    return ELEMENTS_PER_THREAD * torch.get_num_threads()
