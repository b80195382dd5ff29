"""A tiny model folder with a word tokenizer and texts in its vocabulary: what users have locally, in 100 kB."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mxfx.graph.tiny import tiny

_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
WORDS = (*_SPECIAL, *(f"w{i}" for i in range(124)))


def save_model(folder: Path, family: str = "llama-tiny") -> Path:
    """Model (float32) and tokenizer, as ``save_pretrained`` writes them; 128 words."""
    tiny(family).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), _SPECIAL, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    return folder


def save_texts(folder: Path, documents: int = 3, words: int = 40) -> Path:
    """Documents of random words, one ``.txt`` each."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for index in range(documents):
        drawn = torch.randint(0, 124, (words,), generator=generator).tolist()
        (folder / f"{index}.txt").write_text(" ".join(f"w{i}" for i in drawn), encoding="utf-8")
    return folder
