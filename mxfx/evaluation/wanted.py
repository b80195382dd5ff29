"""What `--eval` asks for, read and checked before anything slow is imported."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mxfx.evaluation.results import EvaluationError
from mxfx.evaluation.tasks import TaskOptions, check_task

WIKITEXT, CHAT = "wikitext", "chat"


@dataclass(frozen=True)
class Wanted:
    """What an evaluation measures.

    Attributes:
        names: `wikitext` (the hub's text, or that of `eval_data`), local files and folders, `chat`, tasks of lm-eval.
        eval_data: local documents that stand for `wikitext`.
        limit_tokens: tokens of the first domain; None for all.
        domain_tokens: of each other domain; None for `limit_tokens`.
        batch_size: windows at once. max_length: tokens that the model sees at once.
        tasks: options of lm-eval's tasks.
    """

    names: tuple[str, ...]
    eval_data: str | None = None
    limit_tokens: int | None = None
    domain_tokens: int | None = None
    batch_size: int = 1
    max_length: int = 2048
    tasks: TaskOptions = field(default_factory=TaskOptions)

    @classmethod
    def parse(cls, text: str, **options: Any) -> Wanted:
        """`wikitext,news.txt,chat,arc_easy`. Raises `EvaluationError` for an empty or a repeated name."""
        names = tuple(name.strip() for name in text.split(","))
        if not all(names):
            raise EvaluationError(f"--eval {text!r}: expected names or paths, one comma between two")
        titles = [title(name) for name in names]
        twice = next((t for t in titles if titles.count(t) > 1), None)
        if twice is not None:
            raise EvaluationError(f"--eval {text!r}: {twice!r} would name two results; rename one of the files")
        return cls(names, **options)

    def check(self) -> None:
        """Everything that is known before a model is loaded. Raises `EvaluationError`."""
        if WIKITEXT not in self.names and self.eval_data is not None:
            raise EvaluationError("--eval-data gives the text of wikitext, which --eval does not name")
        for name in self.names:
            if kind(name) == "task":
                check_task(name, self.tasks.include_path)
        for limit in (self.limit_tokens, self.domain_tokens):
            if limit is not None and limit < 2:
                raise EvaluationError(f"a limit of {limit} tokens: expected at least 2")


def title(name: str) -> str:
    """What tables call an entry of `--eval`: a path's stem, or the name itself."""
    return Path(name).stem if kind(name) == "text" else name


def kind(name: str) -> str:
    """Of an entry: `wikitext`, `chat`, `text` (a path) or `task`."""
    if name in (WIKITEXT, CHAT):
        return name
    path = Path(name)
    return "text" if path.exists() or path.suffix in (".txt", ".jsonl", ".parquet") or len(path.parts) > 1 else "task"
