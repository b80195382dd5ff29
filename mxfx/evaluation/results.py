"""What an evaluation measured, with its standard errors, and ratios of perplexities on the same text.

Everything comes with what a paired comparison needs: the log-likelihood of every document and of every window. Two
models read the same text, so the standard error of the *ratio* of their perplexities is far below that of either.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from mxfx.ground.errors import MxfxError

if TYPE_CHECKING:
    from torch import Tensor

Metric = Literal["word_perplexity", "byte_perplexity", "token_perplexity"]


class EvaluationError(MxfxError, ValueError):
    """An evaluation cannot be done or compared; the message says what to do."""


@dataclass(frozen=True)
class Piece:
    """One document or one window: total log-likelihood in nats, and what it is divided by.

    `words` and `bytes` are those of a document, counted as lm-eval does; `tokens` are the scored ones.
    """

    loglikelihood: float
    tokens: int
    words: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class Context:
    """A place where the model differs much from the float model.

    Attributes:
        text: the last tokens before the place, as text.
        next: the token that follows in the text.
        kl: divergence of the two predictions there, nats.
        expected, actual: the likeliest next tokens of the float model and of this one, with their probabilities.
    """

    text: str
    next: str
    kl: float
    expected: list[tuple[str, float]]
    actual: list[tuple[str, float]]


@dataclass(frozen=True)
class Divergence:
    """How far the predictions are from the float model's, over the scored tokens of a domain.

    Attributes:
        mean: mean KL(float ‖ model) of the next token, nats; `stderr` is its standard error over windows.
        median, p90, p99, p999: quantiles of that KL over tokens.
        agreement: share of tokens at which both hold the same token for the likeliest, and its standard error.
        histogram: share of tokens whose KL lies between two neighbours of `edges`; the ends count outward.
        worst: the places of the largest KL, at most one a window.
    """

    mean: float
    stderr: float | None
    median: float
    p90: float
    p99: float
    p999: float
    agreement: float
    agreement_stderr: float | None
    histogram: list[float]
    edges: list[float]
    worst: list[Context]


@dataclass(frozen=True)
class Scores:
    """Every scored token of a domain, in order: what paired comparisons read. All tensors are `(tokens,)` on CPU.

    Attributes:
        targets: the tokens of the text, int32.
        window: index of the window that each lies in, int32.
        loglikelihood: of each target, float32.
        top: the likeliest token in its place, int32.
        kl: KL(float ‖ model) in nats, float32; None where no float model was given.
        float_top: the float model's likeliest token, int32; None likewise.
    """

    targets: Tensor
    window: Tensor
    loglikelihood: Tensor
    top: Tensor
    kl: Tensor | None = None
    float_top: Tensor | None = None


@dataclass(frozen=True)
class EvalResult:
    """What one domain measured; `to_json` leaves out `scores`.

    Attributes:
        task: name of the domain: `wikitext`, the stem of a local path, or `chat`.
        source: `hub`, the local path, or what made the text.
        text_sha: digest of the evaluated text: results of other text cannot be compared.
        word_perplexity, byte_perplexity, bits_per_byte: as lm-eval's, over `documents`.
        token_perplexity: per token, over `windows`.
        windows: lm-eval's own: each document in parts of `max_length` tokens; the last part reads as many tokens as
            the others and scores only those that are left. The first token of a document is predicted from BOS (or
            EOS), that of a later part from the last one.
        stderr: standard error of each metric over documents or windows; None for fewer than two.
        tokens: scored tokens.
        limit_tokens: the limit asked for; None for everything.
        seconds: wall time.
        divergence: from the float model; None where none was given.
        scores: token by token; kept in a file of its own.
    """

    task: str
    source: str
    text_sha: str
    word_perplexity: float
    byte_perplexity: float
    bits_per_byte: float
    token_perplexity: float
    stderr: dict[str, float | None]
    documents: list[Piece]
    windows: list[Piece]
    tokens: int
    max_length: int
    limit_tokens: int | None
    seconds: float
    divergence: Divergence | None = None
    scores: Scores | None = field(default=None, repr=False, compare=False)

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries, lists, numbers and strings."""
        data = dataclasses.asdict(dataclasses.replace(self, scores=None))
        del data["scores"]
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> EvalResult:
        """What `to_json` gave, from a file, where a number that is none is null. Raises `KeyError`, `TypeError`."""
        found = data["divergence"]
        if found is not None:
            found = Divergence(**{**_numbers(found, Divergence), "worst": [Context(**one) for one in found["worst"]]})
        pieces = {name: [Piece(**_numbers(one, Piece)) for one in data[name]] for name in ("documents", "windows")}
        return cls(**{**_numbers(data, cls), **pieces, "divergence": found})


def _numbers(data: Mapping[str, Any], of: type) -> dict[str, Any]:
    """The fields of `of` that are always numbers, with NaN for null; the others as they are."""
    always = {one.name for one in dataclasses.fields(of) if one.type == "float"}
    return {name: math.nan if value is None and name in always else value for name, value in data.items()}


@dataclass(frozen=True)
class Ratio:
    """One perplexity over another on the same text; standard error of that ratio (None for one piece)."""

    ratio: float
    stderr: float | None


def ratio_with_stderr(a: EvalResult, b: EvalResult, metric: Metric = "word_perplexity") -> Ratio:
    """`a`'s perplexity over `b`'s, and the standard error of that ratio from paired differences.

    With d_i the difference of log-likelihoods of piece i and w_i its weight (words, bytes or tokens), the
    log-ratio is the ratio estimator Σd/Σw (Cochran, Sampling Techniques, 3rd ed., §6.4); exp by the delta
    method.

    Raises:
        EvaluationError: the two were not measured on the same text in the same pieces.
    """
    if (a.text_sha, a.max_length) != (b.text_sha, b.max_length):
        raise EvaluationError(
            f"cannot compare results of {a.source} ({a.tokens} tokens) and {b.source} ({b.tokens} tokens): "
            "their text or max_length differs; evaluate both on the same data with the same limit"
        )
    weights, of_a = _weights_and_scores(a, metric)
    same, of_b = _weights_and_scores(b, metric)
    if weights != same:
        raise EvaluationError("the two results count tokens differently: their tokenizers differ")
    differences = [one - other for one, other in zip(of_b, of_a, strict=True)]
    mean, error = weighted_mean(differences, weights)
    ratio = exp(mean)
    return Ratio(ratio, None if error is None else ratio * error)


def _weights_and_scores(result: EvalResult, metric: Metric) -> tuple[list[int], list[float]]:
    pieces = result.windows if metric == "token_perplexity" else result.documents
    unit = {"word_perplexity": "words", "byte_perplexity": "bytes", "token_perplexity": "tokens"}[metric]
    return [getattr(piece, unit) for piece in pieces], [piece.loglikelihood for piece in pieces]


def weighted_mean(values: Sequence[float], weights: Sequence[float]) -> tuple[float, float | None]:
    """Σvalues / Σweights and the standard error of that ratio estimator; None for fewer than two values."""
    total = math.fsum(weights)
    mean = math.fsum(values) / total
    n = len(values)
    if n < 2:
        return mean, None
    squares = math.fsum((value - mean * weight) ** 2 for value, weight in zip(values, weights, strict=True))
    return mean, math.sqrt(n / (n - 1) * squares) / total


def exp(x: float) -> float:
    """A ruined model's perplexity is infinite rather than an OverflowError."""
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


def document_errors(pieces: Sequence[Piece]) -> dict[str, float | None]:
    """Standard errors over documents of the metrics that are divided by words and bytes."""
    scores = [piece.loglikelihood for piece in pieces]
    words, words_error = weighted_mean(scores, [piece.words for piece in pieces])
    per_byte, byte_error = weighted_mean(scores, [piece.bytes for piece in pieces])
    if words_error is None or byte_error is None:
        return dict.fromkeys(("word_perplexity", "byte_perplexity", "bits_per_byte"))
    return {
        "word_perplexity": exp(-words) * words_error,
        "byte_perplexity": exp(-per_byte) * byte_error,
        "bits_per_byte": byte_error / math.log(2),
    }
