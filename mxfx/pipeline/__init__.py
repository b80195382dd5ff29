"""From TOML, one line of text or Python values to a checked, typed pipeline, and back."""

from mxfx.pipeline.config import (
    RAISE_PASSES,
    BudgetConfig,
    CalibrationConfig,
    ModelConfig,
    Pipeline,
    load,
    loads,
)
from mxfx.pipeline.errors import ConfigError, Place
from mxfx.pipeline.order import check_order
from mxfx.pipeline.overrides import apply_overrides
from mxfx.pipeline.schema import schema
from mxfx.pipeline.spec import PassSpec
from mxfx.pipeline.text import from_text, to_text
from mxfx.pipeline.toml import to_toml

__all__ = [
    "RAISE_PASSES",
    "BudgetConfig",
    "CalibrationConfig",
    "ConfigError",
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
