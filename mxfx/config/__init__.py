"""From TOML, one line of text or Python values to a checked, typed pipeline, and back.

Names are loaded on first use: a file that is missing or no TOML is refused before torch is imported.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mxfx.config.emit import EmitConfig
    from mxfx.config.errors import ConfigError, Place
    from mxfx.config.json_schema import schema
    from mxfx.config.order import check_order
    from mxfx.config.overrides import apply_overrides
    from mxfx.config.pipeline import (
        RAISE_PASSES,
        BudgetConfig,
        CalibrationConfig,
        ModelConfig,
        Pipeline,
        load,
        loads,
    )
    from mxfx.config.spec import PassSpec
    from mxfx.config.text import from_text, to_text
    from mxfx.config.toml import to_toml

__all__ = [
    "RAISE_PASSES",
    "BudgetConfig",
    "CalibrationConfig",
    "ConfigError",
    "EmitConfig",
    "ModelConfig",
    "PassSpec",
    "Pipeline",
    "Place",
    "apply_overrides",
    "check_order",
    "from_text",
    "load",
    "loads",
    "schema",
    "to_text",
    "to_toml",
]

_HOME = {
    "RAISE_PASSES": "mxfx.config.pipeline",
    "BudgetConfig": "mxfx.config.pipeline",
    "CalibrationConfig": "mxfx.config.pipeline",
    "ConfigError": "mxfx.config.errors",
    "EmitConfig": "mxfx.config.emit",
    "ModelConfig": "mxfx.config.pipeline",
    "PassSpec": "mxfx.config.spec",
    "Pipeline": "mxfx.config.pipeline",
    "Place": "mxfx.config.errors",
    "apply_overrides": "mxfx.config.overrides",
    "check_order": "mxfx.config.order",
    "from_text": "mxfx.config.text",
    "load": "mxfx.config.pipeline",
    "loads": "mxfx.config.pipeline",
    "schema": "mxfx.config.json_schema",
    "to_text": "mxfx.config.text",
    "to_toml": "mxfx.config.toml",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'mxfx.config' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOME[name]), name)
