"""From TOML, one line of text or Python values to a checked, typed pipeline, and back."""

from mxfx.config.emit import EmitConfig
from mxfx.config.errors import ConfigError, Place
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
from mxfx.config.schema import schema
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
