"""Loading a Hugging Face model and its tokenizer, from the hub or a folder, with one clear error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from mxfx.ground.errors import MxfxError


class ModelError(MxfxError, ValueError):
    """A model or tokenizer cannot be loaded; the message names it and says what to do."""


def load_model(
    name: str | Path, dtype: str = "bfloat16", *, revision: str | None = None, trust_remote_code: bool = False
) -> nn.Module:
    """A causal LM in eval mode on the CPU. ``trust_remote_code`` comes from the command line only.

    Raises ``ModelError``.
    """
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(name), dtype=getattr(torch, dtype), revision=revision, trust_remote_code=trust_remote_code
        )
    except Exception as error:
        # transformers, the hub client and safetensors each raise their own kinds.
        raise ModelError(_message("model", name, error)) from error
    return model.eval()


def load_meta_model(
    name: str | Path, dtype: str = "bfloat16", *, revision: str | None = None, trust_remote_code: bool = False
) -> nn.Module:
    """The model's structure on the meta device: its configuration is read, none of its weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(str(name), revision=revision, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code
            )
        return model.eval()
    except Exception as error:
        raise ModelError(_message("model", name, error)) from error


def load_tokenizer(name: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The model's tokenizer. Raises ``ModelError``."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(name), revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise ModelError(_message("tokenizer", name, error)) from error


def _message(what: str, name: str | Path, error: Exception) -> str:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if Path(name).is_dir():
        return f"the {what} in folder {str(name)!r} cannot be loaded: {first}"
    return (
        f"the {what} {str(name)!r} cannot be loaded: {first}\n"
        "  expected: a folder saved by save_pretrained, or a hub id while the hub can be reached; give it with --model"
    )
