"""Everything that `--eval` asks for, measured on one model after the other on the same text."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from mxfx.evaluation.chat import check_template
from mxfx.evaluation.compare import SAMPLES, write_scores
from mxfx.evaluation.evaluate import Domain, measure, text_domain, window_length
from mxfx.evaluation.results import EvalResult, EvaluationError
from mxfx.evaluation.scoring import FloatLogits
from mxfx.evaluation.tasks import TaskResult, run_task
from mxfx.evaluation.wanted import CHAT, WIKITEXT, Wanted, kind, sampling, title
from mxfx.ground import ranks
from mxfx.ground.clock import part
from mxfx.ground.files import write_file

#: ``(limit_tokens, max_length, how they are drawn)`` to the domain of the float model's own answers.
Chat = Callable[[int | None, int, dict[str, float]], Domain]


@dataclass(frozen=True)
class Evaluation:
    """One model's results by name."""

    domains: dict[str, EvalResult]
    tasks: dict[str, TaskResult]

    @property
    def first(self) -> EvalResult | None:
        """The main domain: the first that was asked for."""
        return next(iter(self.domains.values()), None)

    @property
    def seconds(self) -> float:
        return sum(result.seconds for result in (*self.domains.values(), *self.tasks.values()))

    def to_json(self) -> dict[str, Any]:
        return {
            "domains": {name: result.to_json() for name, result in self.domains.items()},
            "tasks": {name: result.to_json() for name, result in self.tasks.items()},
        }

    def write(self, folder: Path, *, keep: bool = False) -> None:
        """Every token's scores and every task's samples, for `mxfx compare`; `keep`: beside those of other names."""
        if self.domains:
            write_scores(folder, self.domains, keep=keep)
        for result in self.tasks.values():
            for task, samples in result.samples.items():
                lines = (json.dumps(sample, default=str) for sample in samples)
                write_file(folder / f"{SAMPLES}{task}.jsonl", "".join(f"{line}\n" for line in lines).encode())


class Suite:
    """What is wanted, ready for one model after the other: text is read and cut once, before any model is there.

    `longest` is what the model can read at once; `chat_text` makes the domain `chat`, whose text is the float model's:
    it is asked when `domains` are first looked at.

    Raises `EvaluationError` for text that cannot be read, and for `chat` without `chat_text` or chat template.
    """

    def __init__(self, wanted: Wanted, tokenizer: Any, longest: int | None, chat_text: Chat | None = None) -> None:
        self._wanted = wanted
        self._tokenizer = tokenizer
        self._length = window_length(longest, wanted.max_length)
        self._chat = chat_text
        self._names = [name for name in wanted.names if kind(name) != "task"]
        if any(kind(name) == CHAT for name in self._names):
            if chat_text is None:
                raise EvaluationError("--eval chat needs the float model, whose answers it reads: give --float MODEL")
            check_template(tokenizer)
        self._texts = {name: self._text(name) for name in self._names if kind(name) != CHAT}

    @cached_property
    def domains(self) -> list[Domain]:
        """What is read, in the order that was asked for."""
        return [self._texts.get(name) or self._answers(name) for name in self._names]

    @property
    def batch_size(self) -> int:
        """Rows that the model reads at once."""
        return self._wanted.batch_size

    def run(self, model: Any, reference: FloatLogits | None = None) -> Evaluation:
        """Measure everything; `reference` asks for the divergence from the float model."""
        wanted = self._wanted
        domains = {}
        for domain in self.domains:
            with part(f"evaluation of {domain.name}"):
                domains[domain.name] = measure(
                    model, domain, self._tokenizer, batch_size=wanted.batch_size, reference=reference
                )
        tasks = {
            name: run_task(
                model,
                self._tokenizer,
                name,
                wanted.tasks,
                batch_size=wanted.batch_size,
                max_length=self._length,
            )
            for name in wanted.names
            if kind(name) == "task"
        }
        return Evaluation(domains, tasks)

    def _limit(self, name: str) -> int | None:
        wanted = self._wanted
        first = name == self._names[0] or wanted.domain_tokens is None
        return wanted.limit_tokens if first else wanted.domain_tokens

    def _text(self, name: str) -> Domain:
        path, limit = self._wanted.eval_data if name == WIKITEXT else name, self._limit(name)
        return text_domain(title(name), self._tokenizer, path=path, limit_tokens=limit, max_length=self._length)

    def _answers(self, name: str) -> Domain:
        assert self._chat is not None
        return ranks.from_first(partial(self._chat, self._limit(name), self._length, sampling(name)))
