"""The names of the tutorial, Mase and PLENA, and their TOML dialect, as a front end that emits a pipeline.

Names are loaded on first use, so that reading a file stays quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

_HOME = {
    "CollectorFull": "mxfx.calibration.collector",
    "TokenCollector": "mxfx.calibration.collector",
    "attach_token_collector_pass": "mxfx.compat.collector",
    "get_loaders": "mxfx.compat.collector",
    "quantize_module_transform_pass": "mxfx.compat.quantize",
    "ALL_MATMUL_TYPES": "mxfx.compat.search",
    "rotation_search_transform_pass": "mxfx.compat.search",
    **dict.fromkeys(("PassArgs", "from_pass_args", "load_any", "load_quant_config"), "mxfx.compat.tutorial"),
}

if TYPE_CHECKING:
    from mxfx.calibration.collector import CollectorFull, TokenCollector
    from mxfx.compat.collector import attach_token_collector_pass, get_loaders
    from mxfx.compat.quantize import quantize_module_transform_pass
    from mxfx.compat.search import ALL_MATMUL_TYPES, rotation_search_transform_pass
    from mxfx.compat.tutorial import PassArgs, from_pass_args, load_any, load_quant_config

__all__ = [
    "ALL_MATMUL_TYPES", "CollectorFull", "PassArgs", "TokenCollector", "attach_token_collector_pass", "from_pass_args",
    "get_loaders", "load_any", "load_quant_config", "quantize_module_transform_pass", "rotation_search_transform_pass",
]  # fmt: skip


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'mxfx.compat' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOME[name]), name)
