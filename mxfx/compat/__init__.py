"""The tutorial's names and its TOML dialect, as a front end that emits a pipeline."""

from mxfx.compat.quantize import quantize_module_transform_pass
from mxfx.compat.tutorial import PassArgs, from_pass_args, load_any, load_quant_config

__all__ = ["PassArgs", "from_pass_args", "load_any", "load_quant_config", "quantize_module_transform_pass"]
