"""Calls of C kernels, written down where a step is recorded, to be made again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Call:
    """A call of a C kernel, to be made again on the same tensors: ``reads`` and ``result`` are those.

    ``function`` gives 0, or another number where it has written nothing: it found no memory, or numbers that it does
    not take.
    """

    function: Callable[..., int]
    arguments: tuple
    reads: tuple[Tensor, ...]
    result: Tensor


#: Of each thread, where its calls are written down while it does; see ``recorded``.
_LOG = threading.local()


@contextmanager
def recorded() -> Iterator[list[Call]]:
    """The calls of C kernels that this thread makes meanwhile."""
    before, _LOG.calls = getattr(_LOG, "calls", None), []
    try:
        yield _LOG.calls
    finally:
        _LOG.calls = before


def called(function: Callable[..., int], arguments: tuple, reads: tuple, result: Tensor) -> int:
    """What the kernel says; a call that is written down holds its operands and its result."""
    if (calls := getattr(_LOG, "calls", None)) is not None:
        calls.append(Call(function, arguments, tuple(t for t in reads if t is not None), result))
    return function(*arguments)
