"""One ``torch.export`` a structure and process: most tests trace one of a few tiny models, each for a second or two.

What is exported is a copy of the model without data, so that two models of one structure give one graph. ``mxfx`` does
everything else anew each time. Tests of tracing itself go without.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch import nn

_PLAIN = (int, float, str, bool, type(None), tuple)
_KNOWN: dict[Hashable, Any] = {}


@contextmanager
def exported_once(wanted: Callable[[], bool]) -> Iterator[None]:
    """Until the block ends, and while it is ``wanted``, no structure is exported that was exported before."""
    import mxfx.graph.trace as tracing

    export = tracing._export

    def once(skeleton: nn.Module, longest: int) -> Any:
        structure = _structure(skeleton) if wanted() else None
        if structure is None:
            return export(skeleton, longest)
        key = (structure, longest)
        if key not in _KNOWN:
            _KNOWN[key] = export(skeleton, longest)
        return _KNOWN[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracing, "_export", once)
        yield


def _structure(skeleton: nn.Module) -> Hashable | None:
    """Everything that the forward pass of a model of transformers can depend on; None for a model that was changed."""
    found: list[Hashable] = []
    for name, module in skeleton.named_modules(remove_duplicate=False):
        kind = type(module)
        hooked = module._forward_hooks or module._forward_pre_hooks
        if not kind.__module__.startswith(("transformers.", "torch.nn.")) or hooked or "forward" in vars(module):
            return None
        attributes = tuple((key, _said(value)) for key, value in sorted(vars(module).items()) if key[0] != "_")
        found.append((name, kind.__module__, kind.__qualname__, attributes))
        config = getattr(module, "config", None)
        if config is not None:
            names = (getattr(config, f"_{one}_implementation", None) for one in ("attn", "experts"))
            found.append((config.to_json_string(use_diff=False), *names))
    first: dict[int, str] = {}
    for named in (skeleton.named_parameters, skeleton.named_buffers):
        for name, tensor in named(remove_duplicate=False):
            found.append((name, tensor.shape, tensor.stride(), tensor.dtype, first.setdefault(id(tensor), name)))
    return tuple(found)


def _said(value: object) -> str:
    """Numbers and names as they are; of a function its name, of anything else its type."""
    return repr(value) if isinstance(value, _PLAIN) else getattr(value, "__qualname__", type(value).__qualname__)
