"""Perplexity of a causal LM: lm-eval's `wikitext` metrics, and perplexity per token, from one pass.

Both come with what a paired comparison needs: the log-likelihood of every document and of every window. Two
models read the same text, so the standard error of the *ratio* of their perplexities is far below that of
either.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import hashlib
import logging
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch.nn import functional

from mxfx.calibration.datasets import SEPARATOR, DatasetError, documents, leading_bos
from mxfx.ground.errors import MxfxError

Metric = Literal["word_perplexity", "byte_perplexity", "token_perplexity"]

TASK = "wikitext"


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
class EvalResult:
    """What an evaluation measured; `to_json` and `from_json` are inverse.

    Attributes:
        task: always `wikitext`, from the hub or with its metrics on local documents.
        source: `hub`, or the local path.
        text_sha: digest of the evaluated text: results of other text cannot be compared.
        word_perplexity, byte_perplexity, bits_per_byte: lm-eval's, over `documents`.
        token_perplexity: per token, over `windows`.
        windows: lm-eval's own: each document in parts of `max_length` tokens, the last may be shorter. The
            first token of a document is predicted from BOS (or EOS), that of a later part from the last one.
        stderr: standard error of each metric over documents or windows; None for fewer than two.
        tokens: tokens of the evaluated documents.
        limit_tokens: the limit asked for; None for everything.
        seconds: wall time.
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

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries, lists, numbers and strings."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> EvalResult:
        """The result that `to_json` gave."""
        pieces = {key: [Piece(**piece) for piece in data[key]] for key in ("documents", "windows")}
        return cls(**{**data, **pieces})


@dataclass(frozen=True)
class TokenPerplexity:
    """Perplexity per token, its standard error over windows (None for one window), and each window."""

    perplexity: float
    stderr: float | None
    windows: list[Piece]


@dataclass(frozen=True)
class Ratio:
    """One perplexity over another on the same text; standard error of that ratio (None for one piece)."""

    ratio: float
    stderr: float | None


def evaluate(
    model: Any,
    tokenizer: Any,
    *,
    task: str = TASK,
    eval_data: Path | str | None = None,
    limit_tokens: int | None = None,
    batch_size: int = 1,
    max_length: int = 2048,
    device: torch.device | str | None = None,
) -> EvalResult:
    """Word perplexity, byte perplexity and bits per byte by lm-eval; perplexity per token over its windows.

    Without `eval_data`, the text is that of lm-eval's own `wikitext` task (from the hub). With it, lm-eval
    computes the same metrics on local documents, which need no detokenizer. Log-softmax is float32 in both.

    `limit_tokens` takes documents in their fixed order, each cut at a word to its first
    `max(max_length, limit_tokens // documents)` tokens, until at most that many tokens are taken: several
    articles are read even of a small budget, and no window is shorter than it must be.

    Args:
        model: a Hugging Face causal LM, or an object that behaves like one (`.config`, `.device`, logits).
        max_length: tokens that the model sees at once; less where its configuration allows only less.
        device: where the model is moved first; None leaves it.

    Raises:
        EvaluationError: unknown task, hub unreachable, or no text within the limit.
    """
    if task != TASK:
        raise EvaluationError(f"unknown evaluation task {task!r}; expected {TASK!r}")
    if limit_tokens is not None and limit_tokens < 2:
        raise EvaluationError(f"limit_tokens={limit_tokens}: expected at least 2")
    began = time.perf_counter()
    if device is not None:
        model.to(device)
    max_length = min(max_length, getattr(model.config, "max_position_embeddings", max_length))
    lm_task = _hub_task() if eval_data is None else _local_task(eval_data)
    # lm-eval reads a page, and scores its detokenized form.
    pages = [doc["page"] for doc in lm_task.eval_docs]
    pages = cut_documents(pages, tokenizer, limit_tokens=limit_tokens, max_length=max_length)
    lm_task.dataset = {lm_task.config.test_split: _rows(pages)}
    targets = [lm_task.doc_to_target(doc) for doc in lm_task.eval_docs]

    scored = _run_lm_eval(model, tokenizer, lm_task, batch_size=batch_size, max_length=max_length)
    counts = _token_counts(targets, tokenizer)
    pieces = [
        Piece(loglikelihood, tokens, words=_words(page), bytes=len(page.encode("utf-8")))
        for loglikelihood, tokens, page in zip(scored.loglikelihoods, counts, pages, strict=True)
    ]
    per_token = _token_perplexity(scored.windows)
    return EvalResult(
        task=task,
        source="hub" if eval_data is None else str(eval_data),
        text_sha=hashlib.blake2b("\0".join(targets).encode("utf-8"), digest_size=32).hexdigest(),
        word_perplexity=scored.metrics["word_perplexity"],
        byte_perplexity=scored.metrics["byte_perplexity"],
        bits_per_byte=scored.metrics["bits_per_byte"],
        token_perplexity=per_token.perplexity,
        stderr={**_document_errors(pieces), "token_perplexity": per_token.stderr},
        documents=pieces,
        windows=per_token.windows,
        tokens=sum(counts),
        max_length=max_length,
        limit_tokens=limit_tokens,
        seconds=time.perf_counter() - began,
    )


def token_perplexity(
    model: Any, windows: Sequence[torch.Tensor], *, batch_size: int = 1, title: str = "token perplexity"
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
    pieces: list[Piece] = []
    with _progress(title, len(windows)) as advance, torch.no_grad():
        for batch in _equal_lengths(windows, batch_size):
            ids = torch.stack(batch).to(model.device)
            out = model(input_ids=ids)
            logits = out.logits if hasattr(out, "logits") else out
            # A row at a time: float32 logits of a whole batch would be the largest tensor of the run.
            sums = [
                -functional.cross_entropy(row[:-1].float(), target[1:], reduction="sum").item()
                for row, target in zip(logits, ids, strict=True)
            ]
            pieces += [Piece(total, ids.shape[1] - 1) for total in sums]
            advance(len(batch))
    return _token_perplexity(pieces)


def token_windows(texts: Sequence[str], tokenizer: Any, *, length: int) -> list[torch.Tensor]:
    """`texts` joined by a blank line, as int64 windows `(length,)` without overlap; the last may be shorter.

    A window begins with BOS if the tokenizer begins a text with it of its own accord.
    """
    bos = leading_bos(tokenizer)
    body = length - len(bos)
    ids = tokenizer(SEPARATOR.join(texts), add_special_tokens=False)["input_ids"]
    windows = [torch.tensor([*bos, *ids[at : at + body]]) for at in range(0, len(ids), body)]
    return [window for window in windows if window.numel() >= 2]


def cut_documents(pages: Sequence[str], tokenizer: Any, *, limit_tokens: int | None, max_length: int) -> list[str]:
    """The beginnings of `pages`, in order, that hold at most `limit_tokens` tokens; all pages for None.

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
        left -= _token_counts([beginning], tokenizer)[0]
    if not taken:
        raise EvaluationError(f"limit_tokens={limit_tokens} does not hold one word of the first document")
    return taken


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
    mean, error = _weighted_mean(differences, weights)
    ratio = _exp(mean)
    return Ratio(ratio, None if error is None else ratio * error)


def _weights_and_scores(result: EvalResult, metric: Metric) -> tuple[list[int], list[float]]:
    pieces = result.windows if metric == "token_perplexity" else result.documents
    unit = {"word_perplexity": "words", "byte_perplexity": "bytes", "token_perplexity": "tokens"}[metric]
    return [getattr(piece, unit) for piece in pieces], [piece.loglikelihood for piece in pieces]


def _weighted_mean(values: Sequence[float], weights: Sequence[int]) -> tuple[float, float | None]:
    """Σvalues/Σweights and its standard error; None for fewer than two values."""
    total = sum(weights)
    mean = math.fsum(values) / total
    n = len(values)
    if n < 2:
        return mean, None
    squares = math.fsum((value - mean * weight) ** 2 for value, weight in zip(values, weights, strict=True))
    return mean, math.sqrt(n / (n - 1) * squares) / total


def _exp(x: float) -> float:
    """A ruined model's perplexity is infinite rather than an OverflowError."""
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


def _document_errors(pieces: Sequence[Piece]) -> dict[str, float | None]:
    scores = [piece.loglikelihood for piece in pieces]
    words, words_error = _weighted_mean(scores, [piece.words for piece in pieces])
    per_byte, byte_error = _weighted_mean(scores, [piece.bytes for piece in pieces])
    if words_error is None or byte_error is None:
        return dict.fromkeys(("word_perplexity", "byte_perplexity", "bits_per_byte"))
    return {
        "word_perplexity": _exp(-words) * words_error,
        "byte_perplexity": _exp(-per_byte) * byte_error,
        "bits_per_byte": byte_error / math.log(2),
    }


def _words(page: str) -> int:
    # lm-eval's own count for `wikitext`: of the page before detokenization, empty edges included.
    return len(re.split(r"\s+", page))


def _token_counts(texts: Sequence[str], tokenizer: Any) -> list[int]:
    return [len(ids) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]


def _beginning(page: str, tokenizer: Any, tokens: int) -> str:
    """The longest beginning of `page`, whole words only, of at most `tokens` tokens; may be empty."""

    def count(words: int) -> int:
        return _token_counts([page[: ends[words - 1]]], tokenizer)[0] if words else 0

    ends = [match.end() for match in re.finditer(r"\S+", page)]
    if getattr(tokenizer, "is_fast", False):
        # One pass says where the first token begins that is too many; a search would read the page once a step.
        offsets = tokenizer(page, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        if len(offsets) <= tokens:
            return page
        fitting = bisect.bisect_right(ends, offsets[tokens][0])
    else:
        if _token_counts([page], tokenizer)[0] <= tokens:
            return page
        fitting = bisect.bisect_right(range(1, len(ends) + 1), tokens, key=count)
    # A word more never means fewer tokens but for a rare merge at the cut.
    while fitting and count(fitting) > tokens:
        fitting -= 1
    return page[: ends[fitting - 1]] if fitting else ""


def _equal_lengths(windows: Sequence[torch.Tensor], batch_size: int) -> Iterator[list[torch.Tensor]]:
    batch: list[torch.Tensor] = []
    for window in windows:
        if batch and (len(batch) == batch_size or window.numel() != batch[0].numel()):
            yield batch
            batch = []
        batch.append(window)
    yield batch


def _token_perplexity(windows: list[Piece]) -> TokenPerplexity:
    scores = [window.loglikelihood for window in windows]
    mean, error = _weighted_mean(scores, [window.tokens for window in windows])
    perplexity = _exp(-mean)
    return TokenPerplexity(perplexity, None if error is None else perplexity * error, windows)


@dataclass(frozen=True)
class _Scored:
    """lm-eval's metrics, the log-likelihood of each document, and that of each window."""

    metrics: dict[str, float]
    loglikelihoods: list[float]
    windows: list[Piece]


def _run_lm_eval(model: Any, tokenizer: Any, lm_task: Any, *, batch_size: int, max_length: int) -> _Scored:
    from lm_eval import evaluator

    lm = _language_model(model, tokenizer, batch_size=batch_size, max_length=max_length)
    with _quiet("lm_eval"), torch.no_grad():
        results = evaluator.evaluate(lm, {TASK: lm_task}, bootstrap_iters=0, log_samples=True)
    metrics = {name.removesuffix(",none"): value for name, value in results["results"][TASK].items()}
    samples = sorted(results["samples"][TASK], key=lambda sample: sample["doc_id"])
    return _Scored(metrics, [float(sample["filtered_resps"][0]) for sample in samples], lm.windows)


def _language_model(model: Any, tokenizer: Any, *, batch_size: int, max_length: int) -> Any:
    """lm-eval's HFLM with float32 log-softmax, which keeps its windows' scores and shows one progress bar."""
    # Importing lm-eval takes seconds, which only an evaluation should cost.
    from lm_eval.models.huggingface import HFLM

    class LanguageModel(HFLM):
        windows: list[Piece]
        advance: Callable[[int], None]
        encoded: ClassVar[dict[tuple, list[int]]] = {}  # the class, too, lives for one evaluation

        def tok_encode(self, string: str, *args: Any, **options: Any) -> list[int]:
            # A document is asked for twice: for its length, and by lm-eval for its windows.
            key = (string, args, *options.items())
            if key not in self.encoded:
                self.encoded[key] = super().tok_encode(string, *args, **options)
            return list(self.encoded[key])

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            self.windows = []
            lengths = (len(self.tok_encode(request.args[0])) for request in requests)
            total = sum(math.ceil(length / self.max_length) for length in lengths)
            with _progress("perplexity", total) as self.advance:
                return super().loglikelihood_rolling(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests: Any, **options: Any) -> Any:
            scores = super()._loglikelihood_tokens(requests, **{**options, "disable_tqdm": True})
            for (_, _, tokens), (loglikelihood, _) in zip(requests, scores, strict=True):
                self.windows.append(Piece(float(loglikelihood), len(tokens)))
            self.advance(len(requests))
            return scores

    with _quiet("lm_eval"):
        return LanguageModel(
            pretrained=model,
            backend="causal",
            tokenizer=tokenizer,
            batch_size=batch_size,
            max_length=max_length,
            softmax_dtype="float32",
        )


def _hub_task() -> Any:
    import lm_eval.tasks

    # Of the thousands of tasks, only this one's folder is read: seconds less.
    folder = Path(lm_eval.tasks.__file__).parent / TASK
    try:
        with _quiet("lm_eval"):
            manager = lm_eval.tasks.TaskManager(include_path=folder, include_defaults=False)
            return manager.load([TASK])["tasks"][TASK]
    except Exception as error:
        # datasets, huggingface_hub and the HTTP client each raise their own kinds.
        raise EvaluationError(
            f"lm-eval could not load its task {TASK!r} from the hub: {type(error).__name__}: {error}\n"
            "Offline, give local documents: --eval-data FILE (.txt, .jsonl, .parquet) or a folder of .txt"
        ) from error


def _local_task(eval_data: Path | str) -> Any:
    """lm-eval's `wikitext` task on local documents: same output type, metrics and counts, no detokenizer."""
    from lm_eval.api.task import ConfigurableTask

    try:
        pages = documents(eval_data)
    except DatasetError as error:
        raise EvaluationError(f"evaluation data {error}") from error
    metrics = ("word_perplexity", "byte_perplexity", "bits_per_byte")
    dataset = {"test": _rows(pages)}
    with _quiet("lm_eval"):
        return ConfigurableTask(
            config={
                "task": TASK,
                "custom_dataset": lambda **_: dataset,
                "test_split": "test",
                "output_type": "loglikelihood_rolling",
                "doc_to_text": "",
                "doc_to_target": _page,
                "process_results": _process_results,
                "metric_list": [{"metric": metric} for metric in metrics],
                "metadata": {"version": 2.0},
            }
        )


def _rows(pages: Sequence[str]) -> Any:
    from datasets import Dataset

    return Dataset.from_dict({"page": list(pages)})


def _page(doc: dict[str, str]) -> str:
    return doc["page"]


def _process_results(doc: dict[str, str], results: Sequence[float]) -> dict[str, tuple[float, int]]:
    [loglikelihood] = results
    size = len(doc["page"].encode("utf-8"))
    return {
        "word_perplexity": (loglikelihood, _words(doc["page"])),
        "byte_perplexity": (loglikelihood, size),
        "bits_per_byte": (loglikelihood, size),
    }


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """lm-eval warns of everything that is done here on purpose (a model object, a custom data set)."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on standard error with the time that is left; yields what moves it on."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task(title, total=total)
        yield lambda steps: progress.advance(bar, steps)
