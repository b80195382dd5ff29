"""Two models on the same tokens: how far apart they are, and whether that is more than noise.

Two sources of noise stand against a difference. The text is a sample: its standard error comes from paired differences
over windows, whose tokens are not independent. And a recipe run with another seed gives another model: ``floor`` is the
relative spread that this causes, which no amount of text takes away. A difference below two standard deviations of
both together is called noise. An error that few windows give is itself uncertain: it counts for as much more as
Student's t says, and of one window there is none, so no verdict.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mxfx.evaluation.results import EvalResult, EvaluationError, Scores, exp, weighted_mean
from mxfx.graph.tensor_file import read_tensors, write_tensors
from mxfx.ground.files import DamagedFile, parse_json, read_text

FILE = "scores.safetensors"
SAMPLES = "samples-"

#: Relative spread of a figure from seed to seed, as config D shows it (passes_configs/README.md).
FLOOR = 0.01

_COLUMNS = ("targets", "window", "loglikelihood", "top", "kl", "float_top")


@dataclass(frozen=True)
class Difference:
    """One figure of both models on one domain.

    Attributes:
        what: `perplexity`, `KL to float`, `disagreement with float` or `wrong next tokens`.
        a, b: the figure of each model.
        difference: b − a, of perplexities as log-ratio.
        stderr: of the difference, from paired windows; None for one window.
        noise: standard deviation of text and seeds together; None where that of the text is not known.
        p: McNemar's two-sided p for figures that count right and wrong; None for others.
    """

    domain: str
    what: str
    a: float
    b: float
    difference: float
    stderr: float | None
    noise: float | None
    p: float | None = None

    @property
    def is_noise(self) -> bool:
        return self.difference == 0 or (self.noise is not None and abs(self.difference) <= 2 * self.noise)

    @property
    def verdict(self) -> str:
        if self.is_noise:
            return "inside the noise"
        if self.noise is None:
            return "one window: no error"
        return "A is better" if self.difference > 0 else "B is better"


def write_scores(folder: Path, results: Mapping[str, EvalResult], *, keep: bool = False) -> Path:
    """Every domain's scores, token by token, in one file of `folder`; `keep`: other domains that it has stay there."""
    tensors: dict[str, Tensor] = {}
    about: dict[str, dict[str, object]] = {}
    if keep and (folder / FILE).exists():
        try:
            kept, about_kept = read_scores(folder)
        except EvaluationError as error:
            logging.getLogger(__name__).warning("%s; what it held of other texts is gone", error)
            kept, about_kept = {}, {}
        about = {name: of for name, of in about_kept.items() if name not in results}
        columns_of = ((f"{name}/{column}", getattr(kept[name], column)) for name in about for column in _COLUMNS)
        tensors = {name: value for name, value in columns_of if value is not None}
    for name, result in results.items():
        if result.scores is None:
            continue
        columns = {column: getattr(result.scores, column) for column in _COLUMNS}
        tensors |= {f"{name}/{column}": value for column, value in columns.items() if value is not None}
        about[name] = {"text_sha": result.text_sha, "max_length": result.max_length, "source": result.source}
    write_tensors(folder / FILE, tensors, about)
    return folder / FILE


def read_scores(folder: Path | str) -> tuple[dict[str, Scores], dict[str, dict[str, object]]]:
    """What `write_scores` wrote, and what each domain's text was. Raises `EvaluationError`."""
    path = Path(folder)
    path = path / FILE if path.is_dir() else path
    if not path.exists():
        raise EvaluationError(f"{folder}: no scores to compare{_why_none(Path(folder))}")
    try:
        tensors, about = read_tensors(path)
        scores = {name: Scores(**{c: tensors.get(f"{name}/{c}") for c in _COLUMNS}) for name in about}
    except (DamagedFile, TypeError) as error:
        raise EvaluationError(
            f"{path}: no scores to compare, it is damaged ({error}); `mxfx eval` on its model writes them again"
        ) from error
    return scores, about


def _why_none(folder: Path) -> str:
    """Why a folder has no scores, and what to do."""
    if not folder.is_dir():
        return (
            ", there is no such folder; expected one of a pipeline that `mxfx run --eval … --out DIR` wrote: DIR/NAME"
        )
    near = [str(path.parent) for path in (folder.parent / FILE, *sorted(folder.glob(f"*/{FILE}"))) if path.exists()]
    if near:
        return f" in it, but in {', '.join(near)}; give one of them"
    return ": what is in it was not evaluated; `mxfx eval` on its model, or `mxfx run --eval …`, writes them"


def compare(a: Path | str, b: Path | str, *, floor: float = FLOOR) -> list[Difference]:
    """Every figure of the domains that both runs measured on the same tokens.

    Raises:
        EvaluationError: no such run, no domain in common, or a floor that is none.
    """
    _check_floor(floor)
    (of_a, about_a), (of_b, about_b) = read_scores(a), read_scores(b)
    shared = _shared(about_a, about_b)
    if not shared:
        raise EvaluationError(f"{a} measured {', '.join(of_a)}; {b} measured {', '.join(of_b)}: no domain in common")
    found: list[Difference] = []
    for name, other in shared.items():
        if _text(about_a[name]) != _text(about_b[other]):
            raise EvaluationError(
                f"{name}: {a} and {b} were measured on different text or windows; run both with the same --eval options"
            )
        if not torch.equal(of_a[name].targets, of_b[other].targets):
            raise EvaluationError(
                f"{name}: {a} and {b} read the same text as other tokens, for their tokenizers differ: of two models, "
                "token by token there is nothing to compare; their word perplexities are in results.json"
            )
        found += compare_scores(name, of_a[name], of_b[other], floor)
    return found


def _check_floor(floor: float) -> None:
    """Raise `EvaluationError` for a spread under which everything or nothing is noise."""
    if not 0 <= floor < math.inf:
        raise EvaluationError(f"--floor {floor}: expected a relative spread from seed to seed, a number from 0 on")


def _text(about: Mapping[str, object]) -> tuple[object, ...]:
    """What a domain's text is known by; where it lay is not part of it."""
    return about["text_sha"], about["max_length"]


def _shared(a: Mapping[str, Mapping[str, object]], b: Mapping[str, Mapping[str, object]]) -> dict[str, str]:
    """Each domain of `a` to that of `b` on the same text, whatever its name; else, unless that is another's, to its
    namesake, whose text differs.
    """
    texts = {_text(about): name for name, about in b.items()}
    same = {name: texts[_text(about)] for name, about in a.items() if _text(about) in texts}
    same |= {name: name for name in same if name in b and _text(a[name]) == _text(b[name])}
    left = {name: name for name in a if name in b and name not in same and name not in same.values()}
    return {name: (same | left)[name] for name in a if name in same or name in left}


def compare_scores(domain: str, a: Scores, b: Scores, floor: float = FLOOR) -> list[Difference]:
    """The figures of two models on one domain's tokens."""
    found = [_perplexity(domain, a, b, floor)]
    if a.kl is not None and b.kl is not None:
        found.append(_mean(domain, "KL to float", a, a.kl, b.kl, floor))
        pairs = [(s.top != s.float_top).float() for s in (a, b) if s.float_top is not None]
        found.append(_mean(domain, "disagreement with float", a, pairs[0], pairs[1], floor, p=True))
    wrong = [(s.top != s.targets).float() for s in (a, b)]
    found.append(_mean(domain, "wrong next tokens", a, wrong[0], wrong[1], floor, p=True))
    return found


def _perplexity(domain: str, a: Scores, b: Scores, floor: float) -> Difference:
    found = _mean(domain, "perplexity", a, -a.loglikelihood, -b.loglikelihood, 0.0)
    noise = None if found.noise is None else math.hypot(found.noise, math.log1p(floor))
    return Difference(domain, found.what, exp(found.a), exp(found.b), found.difference, found.stderr, noise)


def _mean(domain: str, what: str, like: Scores, a: Tensor, b: Tensor, floor: float, *, p: bool = False) -> Difference:
    sizes = torch.bincount(like.window.long()).double().tolist()

    def sums(values: Tensor) -> list[float]:
        return torch.zeros(len(sizes), dtype=torch.float64).index_add_(0, like.window.long(), values.double()).tolist()

    difference, error = weighted_mean(sums(b - a), sizes)
    mean_a, mean_b = float(a.double().mean()), float(b.double().mean())
    noise = _noise(error, len(sizes), floor * (mean_a + mean_b) / 2)
    right = mcnemar(int(((a == 0) & (b == 1)).sum()), int(((a == 1) & (b == 0)).sum())) if p else None
    return Difference(domain, what, mean_a, mean_b, difference, error, noise, right)


def _noise(error: float | None, pieces: int, seeds: float) -> float | None:
    """Twice this is what a difference must exceed: the error that so many pieces give, and the spread of seeds."""
    if error is None:
        return None
    # Importing scipy takes most of a second.
    from scipy.special import ndtr, stdtrit

    return math.hypot(error * float(stdtrit(pieces - 1, ndtr(2.0))) / 2, seeds)


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided p of McNemar's test, given how often only one of two was right (Psychometrika 12, 1947).

    Exact (binomial) for up to 1000 such cases, else by the normal distribution with continuity correction.
    """
    n, k = only_a + only_b, min(only_a, only_b)
    if n == 0:
        return 1.0
    if n > 1000:
        return math.erfc(max(0.0, abs(only_a - only_b) - 1) / math.sqrt(2 * n))
    tail = math.fsum(math.comb(n, i) for i in range(k + 1)) / 2**n
    return min(1.0, 2 * tail)


def compare_runs(a: Path | str, b: Path | str, *, floor: float = FLOOR) -> list[Difference]:
    """Everything that both runs measured: `compare`, if they share a text, and `compare_samples`.

    Raises:
        EvaluationError: no such run, nothing in common, not the same text or questions, or a floor that is none.
    """
    _check_floor(floor)
    (texts_a, tasks_a), (texts_b, tasks_b) = _held(a), _held(b)
    answers = compare_samples(a, b)
    if _shared(texts_a, texts_b):
        return [*compare(a, b, floor=floor), *answers]
    if answers:
        return answers
    of_a, of_b = (", ".join([*texts, *tasks]) for texts, tasks in ((texts_a, tasks_a), (texts_b, tasks_b)))
    both = ": no question that both were asked, or no metric of right and wrong" if {*tasks_a} & {*tasks_b} else ""
    raise EvaluationError(f"{a} measured {of_a}; {b} measured {of_b}: nothing in common{both}")


def unshared(a: Path | str, b: Path | str) -> list[str]:
    """What `compare_runs` leaves out of two runs in words: texts, tasks and questions of one alone."""
    (texts_a, tasks_a), (texts_b, tasks_b) = _held(a), _held(b)
    shared = _shared(texts_a, texts_b)
    alone = [
        *((name, a) for name in [*texts_a, *tasks_a] if name not in shared and name not in tasks_b),
        *((name, b) for name in [*texts_b, *tasks_b] if name not in shared.values() and name not in tasks_a),
    ]
    asked = {task: [{*map(_asked, tasks[task])} for tasks in (tasks_a, tasks_b)] for task in tasks_a if task in tasks_b}
    return [f"{name}, of {run} alone" for name, run in alone] + [
        f"{len(mine ^ theirs)} answers of {task}, to questions of one alone"
        for task, (mine, theirs) in asked.items()
        if mine != theirs
    ]


def _held(folder: Path | str) -> tuple[dict[str, dict[str, object]], dict[str, list[dict[str, Any]]]]:
    """A run's texts, by what they are known by, and its samples. Raises `EvaluationError` for a run without any."""
    samples = samples_in(folder)
    return ({} if samples and not (Path(folder) / FILE).exists() else read_scores(folder)[1]), samples


def compare_samples(a: Path | str, b: Path | str) -> list[Difference]:
    """Right and wrong answers of the tasks of lm-eval that both runs kept: by document, and by filter of the answer.

    Raises:
        EvaluationError: a document was asked about in two ways.
    """
    found = []
    of_a, of_b = samples_in(a), samples_in(b)
    for task in of_a.keys() & of_b.keys():
        pairs = {_asked(sample): sample for sample in of_b[task]}
        both = [(one, pairs[_asked(one)]) for one in of_a[task] if _asked(one) in pairs]
        if any(x.get("prompt_hash") != y.get("prompt_hash") for x, y in both):
            raise EvaluationError(
                f"{task}: {a} and {b} were asked in different words (examples, chat template); run both with the same "
                "options of the task"
            )
        for name in sorted({filter_ for _, filter_ in map(_asked, of_a[task])}):
            mine = [pair for pair in both if _asked(pair[0])[1] == name]
            for metric in _binary_metrics([sample for pair in mine for sample in pair]):
                title = metric if name == "none" else f"{metric},{name}"
                found.append(_answers(task, title, [(float(x[metric]), float(y[metric])) for x, y in mine]))
    return sorted(found, key=lambda difference: (difference.domain, difference.what))


def _asked(sample: Mapping[str, Any]) -> tuple[Any, str]:
    """A task's document, and lm-eval's filter that its answer went through: each scores every document."""
    return sample["doc_id"], str(sample.get("filter", "none"))


def samples_in(folder: Path | str) -> dict[str, list[dict[str, Any]]]:
    """Samples of lm-eval's tasks in a pipeline's folder, by task. Raises `EvaluationError` for what is none."""
    found = {}
    for path in sorted(Path(folder).glob(f"{SAMPLES}*.jsonl")):
        lines = enumerate(read_text(path).splitlines(), start=1)
        found[path.stem.removeprefix(SAMPLES)] = [_sample(line, f"{path}:{number}") for number, line in lines]
    return found


def _sample(line: str, where: str) -> dict[str, Any]:
    again = "`mxfx eval` with that task writes the file again"
    try:
        found = parse_json(line, where)
    except DamagedFile as error:
        raise EvaluationError(f"{error}: it was cut short or changed; {again}") from error
    wrong = not isinstance(found, dict) or not isinstance(found.get("doc_id"), int | str)
    if wrong or not isinstance(found.get("metrics"), list):
        raise EvaluationError(f"{where}: no sample of lm-eval, which has a doc_id and a list of metrics; {again}")
    return found


def _binary_metrics(samples: Sequence[Mapping[str, Any]]) -> list[str]:
    """Metrics that every sample has as 0 or 1."""
    if not samples:
        return []
    return sorted(set.intersection(*({n for n in s["metrics"] if s.get(n) in (0, 1)} for s in samples)))


def _answers(task: str, metric: str, pairs: Sequence[tuple[float, float]]) -> Difference:
    """A share of wrong answers, so that less is better as in every other figure."""
    n = len(pairs)
    wrong_a, wrong_b = (sum(1 - pair[i] for pair in pairs) for i in (0, 1))
    difference, error = weighted_mean([x - y for x, y in pairs], [1.0] * n)
    p = mcnemar(sum(x > y for x, y in pairs), sum(x < y for x, y in pairs))
    noise = _noise(error, n, 0.0)
    return Difference(task, f"wrong by {metric}", wrong_a / n, wrong_b / n, difference, error, noise, p)
