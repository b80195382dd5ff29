"""The domain `chat`: the float model's own sampled answers, scored under its chat template, answers alone.

No data set of answers fits every model; what a model itself says is the text that its users read.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mxfx.calibration.sampling import Progress, Warp, batch_of, chances, rendered, sample
from mxfx.evaluation.evaluate import Domain
from mxfx.evaluation.results import EvaluationError
from mxfx.evaluation.texts import plain
from mxfx.evaluation.wanted import chat_title
from mxfx.evaluation.windows import answer_window
from mxfx.ground.files import read_json, write_file
from mxfx.ground.progress import track

#: Tokens that are evaluated where no limit is given, and the longest answer: an eighth of them, at most so many.
TOKENS = 16_384
ANSWER = 512

#: About what an answer takes: so many are begun at once that few are left over.
_MEAN_ANSWER = 192

PROMPTS = (
    "What is the capital of Australia, and why was it chosen?",
    "Explain to a ten-year-old how a rainbow forms.",
    "Write a short poem about a lighthouse in winter.",
    "Give me three tips for sleeping better.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "What is the difference between weather and climate?",
    "Summarize the plot of Romeo and Juliet in four sentences.",
    "A train travels 180 kilometres in two and a half hours. What is its average speed?",
    "How do vaccines work?",
    "Write an email to my landlord about a leaking tap in the kitchen.",
    "List the planets of the solar system in order, with one fact about each.",
    "What are the advantages and disadvantages of living in a big city?",
    "Translate into French: Where is the nearest train station?",
    "Tell me a short story about a fox who was afraid of the dark.",
    "What does this SQL query do? SELECT name, COUNT(*) FROM orders GROUP BY name HAVING COUNT(*) > 3;",
    "How do I make pancakes for four people?",
    "Why did the Roman Empire fall?",
    "Explain the difference between a list and a tuple in Python, with an example.",
    "I feel nervous before job interviews. What can I do?",
    "What is photosynthesis?",
    "Rewrite this sentence so that it is more polite: Send me the report now.",
    "If I have 3 apples, give away 1 and buy 4 more, how many apples do I have? Show your steps.",
    "Who was Marie Curie?",
    "Plan a two-day visit to Lisbon.",
    "What is the meaning of the proverb 'a stitch in time saves nine'?",
    "Describe how a bill becomes a law in a parliamentary democracy.",
    "Give five names for a friendly bakery and say why each fits.",
    "How does a bicycle stay upright?",
    "Write a bash command that finds all files larger than 100 MB in the current folder.",
    "What should I look for when I buy a used car?",
    "Explain supply and demand with an example from daily life.",
    "Write a dialogue between a teacher and a student about being late.",
    "What are black holes and how do we know that they exist?",
    "Classify the mood of this review: The room was clean, but the noise kept us awake all night.",
    "How can I save money on groceries?",
    "What is the square root of 144, and what is 12 cubed?",
    "Write a short product description for a waterproof backpack.",
    "What are the main causes of the First World War?",
    "How do I remove a coffee stain from a white shirt?",
    "Explain recursion to somebody who has never programmed.",
    "What is the healthiest way to cook vegetables?",
    "Give me a workout of twenty minutes that needs no equipment.",
    "Correct the grammar: She don't has no time for reading books yesterday.",
    "How do computers store numbers?",
    "Write the opening paragraph of a detective story that takes place on a ferry.",
    "What is the difference between a virus and a bacterium?",
    "Suggest a gift for a friend who loves astronomy, and explain your choice.",
    "What makes bread rise?",
)


def check_template(tokenizer: Any) -> None:
    """Raises `EvaluationError` for a tokenizer without chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise EvaluationError("--eval chat: the tokenizer has no chat template; leave chat out for a base model")


def chat_domain(
    make_model: Callable[[], Any],
    tokenizer: Any,
    *,
    model_key: str,
    limit_tokens: int | None = None,
    max_length: int = 2048,
    sampling: Mapping[str, float] | None = None,
    cache: Path | None = None,
    progress: Progress = track,
) -> Domain:
    """At least one answer, and further ones until `limit_tokens` of them are there; the prompts are gone through again.

    Answers are drawn at temperature 1 from all tokens, or as `sampling` says (`mxfx.evaluation.wanted.sampling`); then
    the domain's name, its source and its hash say so too. `make_model` gives the float model with a cache of keys and
    values; it is asked only where `cache` does not hold the answers yet, under `model_key`, a hash of the float model.

    Raises:
        EvaluationError: the tokenizer has no chat template.
    """
    check_template(tokenizer)
    prompts = [rendered(tokenizer, [{"role": "user", "content": prompt}], answer=True) for prompt in PROMPTS]
    wanted = limit_tokens or TOKENS
    # Of a small budget, several answers are read.
    longest = min(ANSWER, max(64, wanted // 8), max_length - max(len(prompt) for prompt in prompts if prompt))
    sampling = dict(sampling or {})
    key = _digest([model_key, prompts, wanted, longest, *([sampling] if sampling else [])])
    file = None if cache is None else Path(cache) / f"chat-{key[:32]}.json"
    answers = _load(file, key)
    if answers is None:
        answers = _answer(make_model(), tokenizer, [p for p in prompts if p], wanted, longest, sampling, progress)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_file(file, json.dumps({"key": key, "answers": answers}).encode())
    pairs = [(prompts[index % len(prompts)] or [], ids) for index, ids in enumerate(answers)]
    windows = tuple(answer_window(prompt, ids, index) for index, (prompt, ids) in enumerate(pairs))
    documents = tuple(plain(tokenizer.decode(ids)) for _, ids in pairs)
    source = f"the float model's own answers to {min(len(pairs), len(PROMPTS))} built-in prompts"
    name = chat_title(sampling)
    source += f", drawn with {name.partition(':')[2]}" if sampling else ""
    return Domain(name, source, documents, windows, _digest([key, answers]), max_length, limit_tokens)


def _answer(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    wanted: int,
    longest: int,
    sampling: Mapping[str, float],
    progress: Progress,
) -> list[list[int]]:
    """Answers in the order of the prompts, then again, until `wanted` tokens are there; the last one is cut."""
    ends = _ends(model, tokenizer)
    # An answer hangs on its number, not on how many are begun at once.
    generator = torch.Generator().manual_seed(0)
    size = batch_of(model, longest + max(map(len, prompts)))
    mean = min(_MEAN_ANSWER, longest)
    found: list[list[int]] = []
    while sum(map(len, found)) < wanted:
        chosen = [prompts[(len(found) + i) % len(prompts)] for i in range(min(size, -(-wanted // mean)))]
        by = chances(len(chosen), longest, generator)
        rows = sample(model, chosen, longest, by, stop=ends, warp=_warp(sampling), progress=progress)
        found += [_until(row.tolist(), ends) for row in rows]
    total = 0
    for index, ids in enumerate(found):
        total += len(ids)
        if total >= wanted:
            return [*found[:index], ids[: len(ids) - (total - wanted)]]
    return found


def _warp(sampling: Mapping[str, float]) -> Warp | None:
    """What generate does to logits with these options, in its order; None for nothing."""
    if not sampling:
        return None
    from transformers import generation

    warpers: dict[str, Callable[[Any], Any]] = {
        "temperature": generation.TemperatureLogitsWarper,
        "top_k": generation.TopKLogitsWarper,
        "top_p": generation.TopPLogitsWarper,
        "min_p": generation.MinPLogitsWarper,
    }
    chosen = [warpers[option](value) for option, value in sampling.items()]

    def warp(logits: Tensor) -> Tensor:
        for warper in chosen:
            # None of them looks at the tokens so far.
            logits = warper(None, logits)
        return logits

    return warp


def _ends(model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer: the model's and the tokenizer's."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = named if isinstance(named, list) else [named]
    return frozenset(int(token) for token in [*listed, tokenizer.eos_token_id] if token is not None)


def _until(ids: list[int], ends: frozenset[int]) -> list[int]:
    """Up to the first end, which belongs to the answer."""
    at = next((index for index, token in enumerate(ids) if token in ends), len(ids) - 1)
    return ids[: at + 1]


def _load(file: Path | None, key: str) -> list[list[int]] | None:
    if file is None or not file.exists():
        return None
    try:
        data = read_json(file)
        return data["answers"] if data["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logging.getLogger(__name__).warning("%s cannot be read (%s); the answers are made again", file, error)
        return None


def _digest(of: Sequence[object]) -> str:
    return hashlib.blake2b(json.dumps(of).encode(), digest_size=32).hexdigest()
