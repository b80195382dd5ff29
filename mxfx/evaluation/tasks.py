"""lm-eval's tasks by name: any of its own, of an installed plug-in, or of a folder of task files."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from mxfx.evaluation.results import EvaluationError
from mxfx.ground import ranks
from mxfx.ground.errors import MxfxError
from mxfx.ground.nearest import did_you_mean


@dataclass(frozen=True)
class TaskOptions:
    """How tasks are run; None leaves a task as it is.

    Attributes:
        limit: documents of each task.
        num_fewshot: examples before each question.
        apply_chat_template: put questions as a user's turn.
        gen_kwargs: of generation, as lm-eval writes them: `temperature=0.7,max_gen_toks=256`.
        include_path: folder of further task files.
    """

    limit: int | None = None
    num_fewshot: int | None = None
    apply_chat_template: bool = False
    gen_kwargs: str | None = None
    include_path: Path | None = None


@dataclass(frozen=True)
class TaskResult:
    """What lm-eval measured.

    Attributes:
        metrics: value by `metric` (of the task) or `subtask/metric` (of a group), with lm-eval's filter behind a comma.
        stderr: standard error of each, where lm-eval gives one.
        samples: every document with what the model answered, by subtask; kept in files of their own.
    """

    task: str
    metrics: dict[str, float]
    stderr: dict[str, float]
    options: TaskOptions
    seconds: float
    samples: dict[str, list[dict[str, Any]]] = field(default_factory=dict, repr=False, compare=False)

    def rows(self) -> list[tuple[str, str, float, float | None]]:
        """Task, metric, value and standard error."""
        return [(self.task, metric, value, self.stderr.get(metric)) for metric, value in self.metrics.items()]

    def to_json(self) -> dict[str, Any]:
        """Plain values, without the samples."""
        options = {key: str(v) if isinstance(v, Path) else v for key, v in asdict(self.options).items()}
        return {
            "task": self.task,
            "metrics": self.metrics,
            "stderr": self.stderr,
            "options": options,
            "seconds": self.seconds,
        }


def check_task(name: str, include_path: Path | None = None) -> None:
    """Raises `EvaluationError` for a name that neither lm-eval nor the folder knows; loads no data."""
    _manager(name, include_path)


def run_task(
    model: Any, tokenizer: Any, name: str, options: TaskOptions, *, batch_size: int = 1, max_length: int = 2048
) -> TaskResult:
    """Run one task on a causal LM of transformers, log-softmax in float32.

    Of several processes each asks the model a part of the questions; all build them and score the answers, so that
    examples are drawn and answers ordered as by one process, and all get the first one's result.

    Raises:
        EvaluationError: unknown task, or its data cannot be had.
    """
    # Importing lm-eval takes seconds, which only an evaluation should cost.
    from lm_eval import evaluator

    manager = _manager(name, options.include_path)
    began = time.perf_counter()
    with _quiet("lm_eval"):
        try:
            lm = _adapter()(
                pretrained=model,
                backend="causal",
                tokenizer=tokenizer,
                batch_size=batch_size,
                max_length=max_length,
                softmax_dtype="float32",
            )
            found = evaluator.simple_evaluate(
                lm,
                tasks=[name],
                num_fewshot=options.num_fewshot,
                limit=options.limit,
                apply_chat_template=options.apply_chat_template,
                gen_kwargs=options.gen_kwargs,
                log_samples=True,
                task_manager=manager,
            )
        except MxfxError:
            raise  # it says itself what is wrong, or that enough was seen
        except Exception as error:
            # Tasks are code of many hands, and so are their metrics.
            raise EvaluationError(f"--eval {name}: lm-eval stopped: {type(error).__name__}: {error}") from error
    # lm-eval itself gives nothing to processes that are not the first of their host.
    return ranks.from_first(lambda: _result(name, found, options, time.perf_counter() - began))


def _result(name: str, found: Any, options: TaskOptions, seconds: float) -> TaskResult:
    metrics: dict[str, float] = {}
    stderr: dict[str, float] = {}
    for task, values in found["results"].items():
        prefix = "" if task == name else f"{task}/"
        for key, value in values.items():
            if not isinstance(value, int | float) or isinstance(value, bool) or key == "sample_len":
                continue
            short = key.removesuffix(",none")
            into = stderr if "_stderr" in short else metrics
            into[prefix + short.replace("_stderr", "")] = float(value)
    return TaskResult(name, metrics, stderr, options, seconds, found["samples"])


@cache
def _adapter() -> type:
    """lm-eval's class for models of transformers, with one BOS in front of a text that is scored whole.

    Its rolling windows begin with that token themselves; a tokenizer that puts it too (Llama 3's) would have it scored.
    """
    from lm_eval.models.huggingface import HFLM

    class Adapter(HFLM):
        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return _spread(super().loglikelihood, requests, disable_tqdm)

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return _spread(super().generate_until, requests, disable_tqdm)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            given = self.add_bos_token
            self.add_bos_token: bool | None = False
            try:
                return _spread(super().loglikelihood_rolling, requests, disable_tqdm)
            finally:
                self.add_bos_token = given

    return Adapter


def _spread(answer: Callable[[list, bool], list], requests: list, quiet: bool) -> list:
    """The answers to all requests, each given by one rank. Neighbours stay together: they often share a context."""
    mine = requests[ranks.share(len(requests))]
    with ranks.alone():
        found = answer(mine, quiet) if mine else []
    return [one for of_rank in ranks.collected(found) for one in of_rank]


def _manager(name: str, include_path: Path | None) -> Any:
    """lm-eval's register that knows the task: the folder's own, which is read at once, or that of all tasks."""
    if include_path is not None:
        own = _tasks_in(include_path)
        if name in own.all_tasks:
            return own
    known = _all_tasks()
    if name not in known.all_tasks:
        near = did_you_mean(name, ["wikitext", "chat", *known.all_tasks])
        raise EvaluationError(
            f"--eval {name}: no file or folder, and no task of lm-eval (`lm-eval ls tasks` lists them); expected "
            f"wikitext, chat, a path or a task{f'; {near}' if near else ''}"
        )
    return known


@cache
def _tasks_in(folder: Path) -> Any:
    from lm_eval.tasks import TaskManager

    with _quiet("lm_eval"):
        return TaskManager(include_path=str(folder), include_defaults=False)


@cache
def _all_tasks() -> Any:
    from lm_eval.tasks import TaskManager

    with _quiet("lm_eval"):
        return TaskManager()


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """lm-eval warns of everything that is done here on purpose (a model object)."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
