"""mxfx: a torch.fx compiler that rewrites Hugging Face causal LMs into Microscaling (MX) formats.

``trace``, ``load_pipeline``, ``compile``, ``run``, ``load``, ``as_causal_lm``, ``Pipeline`` are loaded on first use, so
that ``import mxfx.formats`` alone stays light.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mxfx.api import check, compile, load, load_pipeline, run
    from mxfx.config import Pipeline
    from mxfx.graph.trace import trace
    from mxfx.runtime.causal_lm import as_causal_lm

_HOME = {
    "trace": "mxfx.graph.trace",
    "Pipeline": "mxfx.config",
    "as_causal_lm": "mxfx.runtime.causal_lm",
    **dict.fromkeys(("check", "compile", "load", "load_pipeline", "run"), "mxfx.api"),
}

__all__ = ["Pipeline", "as_causal_lm", "check", "compile", "load", "load_pipeline", "run", "trace"]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'mxfx' has no attribute {name!r}; it has {', '.join(__all__)}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
