"""What lies beside an emitted model in its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def tokenizer_of(folder: Path) -> Any:
    """The tokenizer saved with a model; None where there is none."""
    if not (folder / "tokenizer_config.json").is_file():
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)
