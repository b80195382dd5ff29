"""What `--eval` asks for, read and checked before anything slow is imported."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mxfx.evaluation.results import EvaluationError
from mxfx.evaluation.tasks import TaskOptions, check_task

WIKITEXT, CHAT = "wikitext", "chat"

#: How answers may be drawn, by generate's names of it: what each is read as, and from where on it is refused.
_SAMPLING: dict[str, tuple[type, float]] = {
    "temperature": (float, math.inf),
    "top_k": (int, math.inf),
    "top_p": (float, 1),
    "min_p": (float, 1),
}


@dataclass(frozen=True)
class Wanted:
    """What an evaluation measures.

    Attributes:
        names: `wikitext` (the hub's text, or that of `eval_data`), local files and folders, tasks of lm-eval, and
            `chat`: answers drawn at temperature 1 from all tokens, or, as `chat:temperature=0.7+top_k=50+top_p=0.9`, as
            transformers' `generate` draws them with those options (it takes top_k = 50 where nothing is said).
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
        """`wikitext,news.txt,chat,arc_easy`. Raises `EvaluationError` for an empty, a repeated or an unknown name."""
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
    """What tables call an entry of `--eval`: a folder's name, a file's stem, or the entry. Raises `EvaluationError`."""
    if kind(name) == CHAT:
        return chat_title(sampling(name))
    if kind(name) != "text":
        return name
    path = Path(name).absolute()  # "." has no name else
    return path.name if path.is_dir() else path.stem


def chat_title(how: Mapping[str, float]) -> str:
    """Name of the domain of answers that are drawn so, the same for the same options."""
    drawn = "+".join(f"{option}={value:g}" for option, value in how.items())
    return f"{CHAT}:{drawn}" if drawn else CHAT


def kind(name: str) -> str:
    """Of an entry: `wikitext`, `chat`, `text` (a path) or `task`."""
    if name == WIKITEXT or name.partition(":")[0] == CHAT:
        return name.partition(":")[0]
    path = Path(name)
    return "text" if path.exists() or path.suffix in (".txt", ".jsonl", ".parquet") or len(path.parts) > 1 else "task"


def sampling(name: str) -> dict[str, float]:
    """How the answers of an entry `chat` or `chat:OPTION=VALUE+…` are drawn, in one order; empty for `chat`.

    Raises `EvaluationError`.
    """
    found: dict[str, float] = {}
    for entry in name.partition(":")[2].split("+") if ":" in name else ():
        option, _, text = entry.partition("=")
        try:
            read, end = _SAMPLING[option]
            value = read(text)
            if not 0 < value < end or option in found:
                raise ValueError
        except (KeyError, ValueError) as error:
            raise EvaluationError(
                f"--eval {name}: {entry!r}; expected each once, one + between two: {', '.join(_SAMPLING)} = a number "
                "above 0, of top_p and min_p below 1, of top_k a whole one"
            ) from error
        found[option] = value
    return {option: found[option] for option in _SAMPLING if option in found}
