"""Windows: which tokens a model reads at once, and which of them are scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mxfx.calibration.datasets import SEPARATOR, leading_bos


@dataclass(frozen=True)
class Window:
    """The model reads `ids`, int64 `(length,)`; its predictions behind the last `scored` of them are for `targets`.

    `targets` is int64 `(scored,)`; `document` is the index of the document that they belong to.
    """

    ids: Tensor
    targets: Tensor
    document: int

    @property
    def scored(self) -> int:
        return self.targets.numel()


def rolling_windows(tokens: Sequence[int], prefix: int, max_length: int, document: int = 0) -> list[Window]:
    """A document's windows as lm-eval's `loglikelihood_rolling` cuts them, every token scored once.

    The first token is predicted from `prefix`. The last window reads `max_length` tokens like the others, where the
    document has as many, and scores those that are left.
    """
    stream = torch.tensor([prefix, *tokens], dtype=torch.int64)
    windows = []
    for start in range(0, len(tokens), max_length):
        end = min(start + max_length, len(tokens))
        first = max(0, end - max_length) if start else 0
        windows.append(Window(stream[first:end], stream[start + 1 : end + 1], document))
    return windows


def answer_window(context: Sequence[int], answer: Sequence[int], document: int) -> Window:
    """One window that reads `context` and `answer` and scores the answer alone."""
    ids = torch.tensor([*context, *answer], dtype=torch.int64)
    return Window(ids[:-1], ids[len(context) :], document)


def prefix_token(tokenizer: Any) -> int:
    """What a document's first token is predicted from: BOS, or EOS where there is none, as in lm-eval."""
    for name in ("bos_token_id", "eos_token_id"):
        found = getattr(tokenizer, name, None)
        if found is not None:
            return int(found)
    return int(tokenizer("a", add_special_tokens=False)["input_ids"][0])


def token_windows(texts: Sequence[str], tokenizer: Any, *, length: int) -> list[Tensor]:
    """`texts` joined by a blank line, as int64 windows `(length,)` without overlap; the last may be shorter.

    A window begins with BOS if the tokenizer begins a text with it of its own accord.
    """
    bos = leading_bos(tokenizer)
    body = length - len(bos)
    ids = tokenizer(SEPARATOR.join(texts), add_special_tokens=False)["input_ids"]
    windows = [torch.tensor([*bos, *ids[at : at + body]]) for at in range(0, len(ids), body)]
    return [window for window in windows if window.numel() >= 2]


def equal_lengths(windows: Sequence[Window], batch_size: int) -> list[list[int]]:
    """Indices of windows in order, in batches of one length."""
    batches: list[list[int]] = []
    for index, window in enumerate(windows):
        last = batches[-1] if batches else []
        if last and len(last) < batch_size and windows[last[0]].ids.numel() == window.ids.numel():
            last.append(index)
        else:
            batches.append([index])
    return batches
