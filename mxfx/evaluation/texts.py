"""Documents of a domain: lm-eval's `wikitext` from the hub, or local files; and their cut to a budget of tokens."""

from __future__ import annotations

import bisect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mxfx.calibration.datasets import DatasetError, documents
from mxfx.evaluation.results import EvaluationError
from mxfx.ground.hub import reached

#: lm-eval's task `wikitext` reads this set, one page a document.
_HUB = {"path": "EleutherAI/wikitext_document_level", "name": "wikitext-2-raw-v1"}


@dataclass(frozen=True)
class Document:
    """What is scored, and the words and bytes that it counts as (lm-eval counts a page before it detokenizes it)."""

    text: str
    words: int
    bytes: int


def plain(page: str) -> Document:
    """A document that is scored as it stands."""
    return Document(page, count_words(page), len(page.encode("utf-8")))


def local_pages(path: Path | str) -> list[str]:
    """Documents of local files. Raises `EvaluationError`."""
    try:
        return documents(path)
    except DatasetError as error:
        raise EvaluationError(f"evaluation data {error}") from error


def hub_pages() -> list[str]:
    """The pages of lm-eval's `wikitext`, which are scored detokenized. Raises `EvaluationError`."""
    import datasets

    try:
        with reached():
            return list(datasets.load_dataset(**_HUB)["test"]["page"])
    except Exception as error:
        # datasets, huggingface_hub and the HTTP client each raise their own kinds.
        raise EvaluationError(
            f"could not load {_HUB['path']!r} (lm-eval's wikitext) from the hub: {type(error).__name__}: {error}\n"
            "Offline, give local documents: --eval-data FILE (.txt, .jsonl, .parquet) or a folder of .txt"
        ) from error


def detokenized(page: str) -> Document:
    """A page of the hub's set as lm-eval scores and counts it."""
    # Importing lm-eval takes seconds, which only this evaluation should cost.
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

    return Document(wikitext_detokenizer({"page": page}), count_words(page), len(page.encode("utf-8")))


def count_words(page: str) -> int:
    """lm-eval's own count for `wikitext`: of the page before detokenization, empty edges included."""
    return len(re.split(r"\s+", page))


def cut_documents(pages: Sequence[str], tokenizer: Any, *, limit_tokens: int | None, max_length: int) -> list[str]:
    """The beginnings of `pages`, in order, that hold at most `limit_tokens` tokens; all pages for None.

    Each is cut at a word to its first `max(max_length, limit_tokens // documents)` tokens: several documents are read
    even of a small budget, and no window is shorter than it must be.

    Raises:
        EvaluationError: not even one word fits.
    """
    if limit_tokens is None:
        return list(pages)
    quota = max(max_length, limit_tokens // len(pages))
    left = limit_tokens
    taken: list[str] = []
    for page in pages:
        beginning = _beginning(page, tokenizer, min(quota, left))
        if not beginning:
            break
        taken.append(beginning)
        left -= _token_count(beginning, tokenizer)
    if not taken:
        raise EvaluationError(f"limit_tokens={limit_tokens} does not hold one word of the first document")
    return taken


def _token_count(text: str, tokenizer: Any) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def _beginning(page: str, tokenizer: Any, tokens: int) -> str:
    """The longest beginning of `page`, whole words only, of at most `tokens` tokens; may be empty."""

    def count(words: int) -> int:
        return _token_count(page[: ends[words - 1]], tokenizer) if words else 0

    ends = [match.end() for match in re.finditer(r"\S+", page)]
    if getattr(tokenizer, "is_fast", False):
        # One pass says where the first token begins that is too many; a search would read the page once a step.
        offsets = tokenizer(page, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        if len(offsets) <= tokens:
            return page
        fitting = bisect.bisect_right(ends, offsets[tokens][0])
    else:
        if _token_count(page, tokenizer) <= tokens:
            return page
        fitting = bisect.bisect_right(range(1, len(ends) + 1), tokens, key=count)
    # A word more never means fewer tokens but for a rare merge at the cut.
    while fitting and count(fitting) > tokens:
        fitting -= 1
    return page[: ends[fitting - 1]] if fitting else ""
