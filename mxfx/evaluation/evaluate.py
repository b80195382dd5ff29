"""Perplexity and divergence of a causal LM on one domain, from one pass over its text.

Word perplexity, byte perplexity and bits per byte are those of lm-eval's task `wikitext`, over its windows; a test
holds them against lm-eval. With the float model at hand, each token also gets the divergence of the two predictions.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mxfx.evaluation import texts
from mxfx.evaluation.results import (
    Context,
    Divergence,
    EvalResult,
    EvaluationError,
    Piece,
    Scores,
    document_errors,
    exp,
    weighted_mean,
)
from mxfx.evaluation.scoring import FloatLogits, Worst, score
from mxfx.evaluation.wanted import WIKITEXT
from mxfx.evaluation.windows import Window, prefix_token, rolling_windows

#: Edges of the KL histogram in nats, two a decade.
_EDGES = [10 ** (exponent / 2) for exponent in range(-10, 4)]
_WORST = 5
_SHOWN_TOKENS = 40


@dataclass(frozen=True)
class Domain:
    """Text of one kind, cut into windows.

    Attributes:
        name: what tables call it.
        source: where it came from.
        documents: what the windows' documents count as.
        windows: in order; every scored token is in one of them.
        sha: digest of text and windows.
        max_length: tokens that a model reads at once.
        limit_tokens: the limit asked for.
    """

    name: str
    source: str
    documents: tuple[texts.Document, ...]
    windows: tuple[Window, ...]
    sha: str
    max_length: int
    limit_tokens: int | None = None

    @property
    def tokens(self) -> int:
        return sum(window.scored for window in self.windows)


@dataclass(frozen=True)
class TokenPerplexity:
    """Perplexity per token, its standard error over windows (None for one window), and each window."""

    perplexity: float
    stderr: float | None
    windows: list[Piece]


def text_domain(
    name: str,
    tokenizer: Any,
    *,
    path: Path | str | None = None,
    limit_tokens: int | None = None,
    max_length: int = 2048,
) -> Domain:
    """Local documents at `path`, or lm-eval's `wikitext` from the hub without one; see `cut_documents` for the limit.

    Raises:
        EvaluationError: hub unreachable, no text within the limit, or one of a single token.
    """
    if limit_tokens is not None and limit_tokens < 2:
        raise EvaluationError(f"limit_tokens={limit_tokens}: expected at least 2")
    pages = texts.hub_pages() if path is None else texts.local_pages(path)
    pages = texts.cut_documents(pages, tokenizer, limit_tokens=limit_tokens, max_length=max_length)
    documents = tuple(texts.plain(page) if path is not None else texts.detokenized(page) for page in pages)
    encoded = tokenizer([document.text for document in documents], add_special_tokens=False)["input_ids"]
    prefix = prefix_token(tokenizer)
    windows = tuple(
        window for index, ids in enumerate(encoded) for window in rolling_windows(ids, prefix, max_length, index)
    )
    if (count := sum(window.scored for window in windows)) < 2:
        where = f"evaluation data {path or name}"
        raise EvaluationError(f"{where}: the tokenizer makes {count} of it, expected at least 2 tokens")
    sha = hashlib.blake2b("\0".join(d.text for d in documents).encode("utf-8"), digest_size=32).hexdigest()
    return Domain(name, "hub" if path is None else str(path), documents, windows, sha, max_length, limit_tokens)


def evaluate(
    model: Any,
    tokenizer: Any,
    *,
    task: str = WIKITEXT,
    eval_data: Path | str | None = None,
    limit_tokens: int | None = None,
    batch_size: int = 1,
    max_length: int = 2048,
    device: torch.device | str | None = None,
    reference: FloatLogits | None = None,
) -> EvalResult:
    """`measure` on lm-eval's `wikitext` from the hub, or on local documents with its metrics.

    Args:
        model: a Hugging Face causal LM, or an object that behaves like one (`.config`, `.device`, logits).
        max_length: tokens that the model sees at once; less where its configuration allows only less.
        device: where the model is moved first; None leaves it.

    Raises:
        EvaluationError: unknown task, hub unreachable, or no text within the limit.
    """
    if task != WIKITEXT:
        raise EvaluationError(f"unknown evaluation task {task!r}; expected {WIKITEXT!r}")
    if device is not None:
        model.to(device)
    length = window_length(getattr(model.config, "max_position_embeddings", None), max_length)
    domain = text_domain(task, tokenizer, path=eval_data, limit_tokens=limit_tokens, max_length=length)
    return measure(model, domain, tokenizer, batch_size=batch_size, reference=reference)


def window_length(longest: int | None, max_length: int = 2048) -> int:
    """`max_length`, or less where the model takes only less."""
    return min(max_length, longest or max_length)


def measure(
    model: Any, domain: Domain, tokenizer: Any, *, batch_size: int = 1, reference: FloatLogits | None = None
) -> EvalResult:
    """Perplexities of a domain's text, and with `reference` the divergence from the float model.

    `tokenizer` only turns the worst contexts back into text.
    """
    began = time.perf_counter()
    scores, worst = score(
        model,
        domain.windows,
        batch_size=batch_size,
        reference=reference,
        key=domain.sha,
        title=f"{domain.name}: {'perplexity' if reference is None else 'perplexity and divergence'}",
    )
    sums = _window_sums(scores.loglikelihood, scores, len(domain.windows))
    windows = [Piece(total, window.scored) for total, window in zip(sums, domain.windows, strict=True)]
    documents = [
        Piece(math.fsum(w.loglikelihood for w in mine), sum(w.tokens for w in mine), document.words, document.bytes)
        for document, mine in zip(domain.documents, _by_document(windows, domain), strict=True)
    ]
    total = math.fsum(piece.loglikelihood for piece in documents)
    per_byte = total / sum(piece.bytes for piece in documents)
    per_token = _token_perplexity(windows)
    return EvalResult(
        task=domain.name,
        source=domain.source,
        text_sha=domain.sha,
        word_perplexity=exp(-total / sum(piece.words for piece in documents)),
        byte_perplexity=exp(-per_byte),
        bits_per_byte=-per_byte / math.log(2),
        token_perplexity=per_token.perplexity,
        stderr={**document_errors(documents), "token_perplexity": per_token.stderr},
        documents=documents,
        windows=windows,
        tokens=domain.tokens,
        max_length=domain.max_length,
        limit_tokens=domain.limit_tokens,
        seconds=time.perf_counter() - began,
        divergence=None if scores.kl is None else _divergence(scores, worst, domain, tokenizer),
        scores=scores,
    )


def token_perplexity(
    model: Any, windows: Sequence[Tensor], *, batch_size: int = 1, title: str = "token perplexity"
) -> TokenPerplexity:
    """Perplexity of each window's tokens but the first, given those before them in the window.

    Args:
        model: called with `input_ids` `(batch, length)`; returns logits or an object with `.logits`.
        windows: int64 `(length,)` each, of any lengths of at least 2; see `token_windows`.
        title: of the progress bar.

    Raises:
        EvaluationError: no window, or one of fewer than two tokens.
    """
    if not windows or any(window.numel() < 2 for window in windows):
        raise EvaluationError("token perplexity needs at least one window, and two tokens in each")
    found = [Window(ids[:-1], ids[1:], 0) for ids in windows]
    scores, _ = score(model, found, batch_size=batch_size, title=title)
    sums = _window_sums(scores.loglikelihood, scores, len(found))
    return _token_perplexity([Piece(total, window.scored) for total, window in zip(sums, found, strict=True)])


def _token_perplexity(windows: list[Piece]) -> TokenPerplexity:
    scores = [window.loglikelihood for window in windows]
    mean, error = weighted_mean(scores, [window.tokens for window in windows])
    perplexity = exp(-mean)
    return TokenPerplexity(perplexity, None if error is None else perplexity * error, windows)


def _by_document(pieces: list[Piece], domain: Domain) -> list[list[Piece]]:
    """The windows of each document."""
    found: list[list[Piece]] = [[] for _ in domain.documents]
    for piece, window in zip(pieces, domain.windows, strict=True):
        found[window.document].append(piece)
    return found


def _window_sums(values: Tensor, scores: Scores, count: int) -> list[float]:
    """Sums of a column over each window, in float64."""
    sums = torch.zeros(count, dtype=torch.float64)
    return sums.index_add_(0, scores.window.long(), values.double()).tolist()


def _divergence(scores: Scores, worst: list[Worst], domain: Domain, tokenizer: Any) -> Divergence:
    assert scores.kl is not None and scores.float_top is not None
    sizes = [window.scored for window in domain.windows]
    kl = scores.kl.double()
    agree = (scores.top == scores.float_top).double()
    mean, error = weighted_mean(_window_sums(kl, scores, len(sizes)), sizes)
    share, share_error = weighted_mean(_window_sums(agree, scores, len(sizes)), sizes)
    ordered = kl.sort().values
    median, p90, p99, p999 = (_quantile(ordered, q) for q in (0.5, 0.9, 0.99, 0.999))
    places = torch.bucketize(kl, torch.tensor(_EDGES[1:-1], dtype=torch.float64))
    counts = torch.bincount(places, minlength=len(_EDGES) - 1).double() / len(kl)
    shown = sorted(worst, key=lambda place: -place.kl)[:_WORST]
    return Divergence(
        mean=mean,
        stderr=error,
        median=median,
        p90=p90,
        p99=p99,
        p999=p999,
        agreement=share,
        agreement_stderr=share_error,
        histogram=counts.tolist(),
        edges=list(_EDGES),
        worst=[_context(place, domain.windows[place.window], tokenizer) for place in shown],
    )


def _quantile(ordered: Tensor, q: float) -> float:
    """Linear between neighbours, as `torch.quantile`, which refuses more than 16 million values."""
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return float(ordered[low] + (ordered[high] - ordered[low]) * (place - low))


def _context(place: Worst, window: Window, tokenizer: Any) -> Context:
    end = window.ids.numel() - window.scored + place.position + 1
    before = window.ids[max(0, end - _SHOWN_TOKENS) : end].tolist()

    def texts_of(pairs: list[tuple[int, float]]) -> list[tuple[str, float]]:
        return [(tokenizer.decode([token]), share) for token, share in pairs]

    return Context(
        text=tokenizer.decode(before),
        next=tokenizer.decode([int(window.targets[place.position])]),
        kl=place.kl,
        expected=texts_of(place.expected),
        actual=texts_of(place.actual),
    )
