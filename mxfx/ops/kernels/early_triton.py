"""Kernels of a step that start while the one before them ends: programmatic dependent launch, since Hopper.

Such a kernel may be on its multiprocessors before what it reads is written. Until it waits it only asks for its weights
to come to the L2 cache, where everything written is seen; all it reads and writes comes after.

Importable only where `triton` is.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

#: Whether any does; benchmarks say no to compare.
EARLY = True
#: Rows of a step at most: kernels of more take so long that nothing is gained.
STEP_ROWS = 64
#: Bytes of a line of memory.
_LINE = tl.constexpr(128)
#: Lines of a row of weights that are asked for at once.
_LINES = tl.constexpr(8)


def starts_early(device: torch.device, rows: int) -> bool:
    """Whether kernels of a device do, for so many rows; the interpreter's cannot."""
    return EARLY and rows <= STEP_ROWS and _can(device)


@cache
def _can(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def wait(EARLY: tl.constexpr):
    """Let the next kernel start, and wait until all that the one before wrote is there."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def ask_for(pointer, row, rows, length, EARLY: tl.constexpr):
    """Bring rows of `length` bytes to the L2 cache: those of number `row`, where there are `rows`."""
    if EARLY:
        # A row that is not there is asked for as the last that is: no address is beyond the weights.
        start = tl.minimum(row, rows - 1).to(tl.int64) * length
        start = pointer.to(tl.pointer_type(tl.uint8)) + start
        for first in range(0, length, _LINES * _LINE):
            byte = tl.minimum(first + tl.arange(0, _LINES) * _LINE, length - 1)
            tl.inline_asm_elementwise(
                "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
                "=r,l",
                [(start[:, None] + byte[None, :]).to(tl.int64)],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )
