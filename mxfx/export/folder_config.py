"""The configuration of an emitted model, as transformers reads it from the folder's ``config.json``."""

from __future__ import annotations

from typing import Any

from transformers.configuration_utils import PreTrainedConfig

MODEL_TYPE = "mxfx"
ARCHITECTURE = "MxfxForCausalLM"

#: Entries of the source's configuration that speak of its own files or class.
_OWN = ("model_type", "architectures", "auto_map", "transformers_version", "quantization_config", "_name_or_path")


class MxfxConfig(PreTrainedConfig):
    """The configuration of an emitted model; it shows the entries of ``source``, that of the model it was made from."""

    model_type = MODEL_TYPE
    source: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        shown = {key: value for key, value in (self.source or {}).items() if key not in _OWN}
        for key in ("rope_parameters", "rope_scaling", "dtype", "torch_dtype"):
            shown.pop(key, None)
        super().__post_init__(**{**shown, **kwargs})

    def to_dict(self) -> dict[str, Any]:
        """What ``config.json`` holds: the source's entries once, under ``source``."""
        kept = {
            "model_type": MODEL_TYPE,
            "architectures": [ARCHITECTURE],
            "auto_map": {
                "AutoConfig": "modeling_mxfx.MxfxConfig",
                "AutoModelForCausalLM": f"modeling_mxfx.{ARCHITECTURE}",
            },
            "dtype": str(self.dtype).removeprefix("torch."),
            "source": self.source,
        }
        return kept

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


def register() -> None:
    """Let ``AutoConfig`` read it; calling it again does nothing."""
    from transformers.models.auto.configuration_auto import AutoConfig

    AutoConfig.register(MODEL_TYPE, MxfxConfig, exist_ok=True)
