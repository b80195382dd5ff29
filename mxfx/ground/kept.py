"""Tensors that are kept on a device for all calls: made once, for good, and by a call that really runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from threading import Lock
from typing import Generic, TypeVar

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from mxfx.ground.errors import MxfxError

Value = TypeVar("Value")


class RecordingError(MxfxError, RuntimeError):
    """What is kept would first be made while a CUDA graph is recorded."""


class Kept(Generic[Value]):
    """Decorator: what a function gives for a key that ends with a device, made once; nothing of it is let go.

    A CUDA graph would keep it in memory of its own, where nothing is before the first replay and each replay writes it
    anew: a counter would begin again. So a call that is recorded must not be the first; it raises ``RecordingError``.
    Nor may a graph read what is gone by its replay. Under fake tensors, where `torch.compile` asks for what it will
    compute, the function is called anew: kept, what it gives would be no tensor for any call after.
    """

    def __init__(self, make: Callable[..., Value]) -> None:
        self._make = make
        self._found: dict[tuple, Value] = {}
        self._one_at_a_time = Lock()
        self.__doc__ = make.__doc__

    def __call__(self, *key: object) -> Value:
        if _get_current_dispatch_mode() is not None:
            return self._make(*key)
        found = self._found.get(key)
        return self._first(key) if found is None else found

    def _first(self, key: tuple) -> Value:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RecordingError(
                f"{self._make.__name__} of {', '.join(map(str, key))} is first asked for while a CUDA graph is "
                "recorded; run what is recorded once before, as kernels must be compiled by then too"
            )
        # Made for inference, it could be no part of a gradient later.
        with self._one_at_a_time, torch.inference_mode(False):
            if key not in self._found:
                self._found[key] = self._make(*key)
            return self._found[key]

    def __iter__(self) -> Iterator[Value]:
        """All that was made."""
        return iter(tuple(self._found.values()))
