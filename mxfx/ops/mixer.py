"""``mxfx::mixer``: a recurrent or convolutional mixer as one node that runs transformers' own reference code.

transformers marks functions that a faster kernel may replace (scans, delta rules, causal convolutions). Their reference
code loops over the sequence, so a trace of it would hold for one length; as one node it holds for every length and is
never rewritten inside.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from importlib import import_module

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from mxfx.ops.dialect import define

_MODULE = re.compile(r"transformers\.models\.\w+\.modeling_\w+")
#: Two values for each symbolic size: what changes between them in a result depends on it.
_PROBES = ((3, 17, 29, 37), (5, 23, 31, 41))


def is_marked(function: object) -> bool:
    """Whether transformers marks a function as one that a kernel may replace, with reference code behind it."""
    code = getattr(function, "__code__", None)
    marked = code is not None and code.co_qualname.startswith("use_kernel_func_from_hub_with_fallback.")
    return marked and callable(getattr(function, "__wrapped__", None))


def reference(function: str) -> Callable:
    """The reference code of a marked function, named ``module:name``.

    Raises ``ValueError`` for anything else: a name in a file must not make mxfx import and call what it likes.
    """
    module, _, name = function.partition(":")
    if _MODULE.fullmatch(module):
        found = getattr(import_module(module), name, None)
        found = getattr(found, "marked", found)
        if is_marked(found):
            return found.__wrapped__
    raise ValueError(f"{function!r} is no function of transformers that a kernel may replace; expected module:name")


def call_reference(tensors: Sequence[Tensor | None], function: str, arguments: str) -> object:
    """What the reference code returns; see ``mixer`` for ``arguments``."""
    positional, by_name = json.loads(arguments, object_hook=lambda d: tensors[d["tensor"]] if "tensor" in d else d)
    return reference(function)(*positional, **by_name)


def sketch_of(tensors: Sequence[Tensor | None], function: str, arguments: str, probe: int = 0) -> object:
    """What the reference code returns for operands without numbers, at concrete sizes: probe 0 or 1."""
    values = dict(zip(_symbols(tensors), _PROBES[probe], strict=False))
    concrete = [None if t is None else ([_value(size, values) for size in t.shape], t.dtype) for t in tensors]
    with _disable_current_modes(), torch.no_grad():
        made = [None if c is None else torch.empty(c[0], dtype=c[1], device="meta") for c in concrete]
        return call_reference(made, function, arguments)


def _shape(tensors: Sequence[Tensor | None], function: str, arguments: str) -> Tensor:
    """The result without numbers: a size that is another one for other sizes is symbolic."""
    given = [t for t in tensors if t is not None]
    found = [first_of(sketch_of(tensors, function, arguments, probe)) for probe in (0, 1)]
    sizes = [s for t in given for s in t.shape if isinstance(s, torch.SymInt)]
    shape = [_symbolic(dims, sizes, _symbols(tensors)) for dims in zip(*(f.shape for f in found), strict=True)]
    return given[0].new_empty(shape, dtype=found[0].dtype)


def _symbols(tensors: Sequence[Tensor | None]) -> list:
    sizes = [s for t in tensors if t is not None for s in t.shape if isinstance(s, torch.SymInt)]
    return sorted({x for s in sizes for x in s.node.expr.free_symbols}, key=str)


def _value(size: int | torch.SymInt, values: dict) -> int:
    return int(size.node.expr.subs(values)) if isinstance(size, torch.SymInt) else size


def _symbolic(dims: tuple[int, ...], sizes: list[torch.SymInt], symbols: list) -> int | torch.SymInt:
    if len(set(dims)) == 1:
        return dims[0]
    for size in sizes:
        if dims == tuple(_value(size, dict(zip(symbols, probe, strict=False))) for probe in _PROBES):
            return size
    raise ValueError(f"a size of the result, {dims[0]} and {dims[1]} in two runs, is none of the operands'")


def first_of(result: object) -> Tensor:
    """The output of a mixer that may return its state beside it."""
    out = result[0] if isinstance(result, tuple | list) else result
    if not isinstance(out, Tensor):
        raise ValueError(f"expected a tensor or a tuple that starts with one, got {type(out).__name__}")
    return out


def _fake(tensors: Sequence[Tensor | None], function: str, arguments: str) -> Tensor:
    if not any(isinstance(t, FakeTensor) for t in tensors):
        return mixer(tensors, function, arguments)
    return _shape(tensors, function, arguments)


def _no_derivative(ctx: object, grad: Tensor) -> tuple:
    raise NotImplementedError("mxfx::mixer has a derivative in a lowered program only")


@define("mixer", fake=_fake, backward=_no_derivative)
def mixer(tensors: Sequence[Tensor | None], function: str, arguments: str) -> Tensor:
    """The first result of the reference code of a function of transformers, in eval mode and without a cache.

    ``function`` is ``module:name``; ``arguments`` is JSON ``[positional, by name]`` in which ``{"tensor": i}`` stands
    for an operand. Raises ``ValueError`` for a function that transformers does not mark as a kernel's reference.
    """
    return first_of(call_reference(tensors, function, arguments)).contiguous()
