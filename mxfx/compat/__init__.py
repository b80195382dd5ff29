"""The tutorial's names and its TOML dialect, as a front end that emits a pipeline.

Names are loaded on first use, so that reading a file stays quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mxfx.compat.quantize import quantize_module_transform_pass
    from mxfx.compat.tutorial import PassArgs, from_pass_args, load_any, load_quant_config

__all__ = ["PassArgs", "from_pass_args", "load_any", "load_quant_config", "quantize_module_transform_pass"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'mxfx.compat' has no attribute {name!r}; it has {', '.join(__all__)}")
    home = "mxfx.compat.quantize" if name == "quantize_module_transform_pass" else "mxfx.compat.tutorial"
    return getattr(import_module(home), name)
