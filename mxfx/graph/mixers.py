"""Mixers at trace time: calls of functions that transformers lets kernels replace become ``mxfx::mixer`` nodes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature

import torch
from torch import Tensor, nn

from mxfx.graph.errors import TraceError
from mxfx.ops.mixer import is_marked, sketch_of


@contextmanager
def opaque_mixers(model: nn.Module) -> Iterator[None]:
    """While open, every marked function in the modules that define ``model`` is one op to a trace."""
    homes = {type(module).__module__ for module in model.modules()}
    replaced: list[tuple[object, str, Callable]] = []
    try:
        for home in sorted(homes):
            module = sys.modules[home]
            for name, function in list(vars(module).items()):
                if is_marked(function):
                    replaced.append((module, name, function))
                    setattr(module, name, _opaque(function))
        yield
    finally:
        for module, name, function in replaced:
            setattr(module, name, function)


def _opaque(marked: Callable) -> Callable:
    source = marked.__wrapped__
    known = signature(source).parameters
    name = f"{source.__module__}:{source.__name__}"

    def call(*args: object, **kwargs: object) -> object:
        kwargs = {key: value for key, value in kwargs.items() if key in known}
        tensors: list[Tensor | None] = []

        def encoded(value: object) -> object:
            if isinstance(value, Tensor):
                tensors.append(value)
                return {"tensor": len(tensors) - 1}
            if isinstance(value, list | tuple):
                return [encoded(item) for item in value]
            if value is None or type(value) in (bool, int, float, str):
                return value
            raise TraceError(f"{name} takes {value!r}, which a program cannot hold; expected tensors and constants")

        arguments = json.dumps([[encoded(a) for a in args], {k: encoded(v) for k, v in kwargs.items()}])
        sketch = sketch_of(tensors, name, arguments)
        if sketch is None:
            # There is no reference code: the model goes another way.
            return None
        out = torch.ops.mxfx.mixer(tensors, name, arguments)
        # A state beside the output is for a cache, which a trace does not have.
        return (out, *(None for _ in sketch[1:])) if isinstance(sketch, tuple) else out

    call.marked = marked
    return call
