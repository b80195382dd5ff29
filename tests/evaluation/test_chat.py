"""The domain `chat`: the float model's answers under its template, answers alone scored, made once."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from mxfx.driver.texts import FloatTexts
from mxfx.evaluation.chat import PROMPTS, chat_domain
from mxfx.evaluation.evaluate import measure
from mxfx.evaluation.results import EvaluationError
from tests.evaluation.chatty import byte_model, byte_tokenizer


@pytest.fixture(scope="module")
def model():
    return byte_model()


def _domain(model, **options):
    return chat_domain(
        lambda: model, byte_tokenizer(), model_key="m", limit_tokens=400, **{"max_length": 256} | options
    )


def test_answers_alone_are_scored_under_the_template(model) -> None:
    tokenizer, domain = byte_tokenizer(), _domain(model)
    assert domain.tokens == 400
    for index, window in enumerate(domain.windows):
        asked = tokenizer.decode(torch.cat([window.ids, window.targets[-1:]])[: -window.scored])
        assert asked == f"<turn>user: {PROMPTS[index % len(PROMPTS)]}</turn><turn>assistant: "
    result = measure(model, domain, tokenizer)
    first = domain.windows[0]
    scores = model(first.ids[None]).logits[0].log_softmax(-1)[-first.scored :]
    wanted = scores[range(first.scored), first.targets].sum().item()
    assert result.windows[0].loglikelihood == pytest.approx(wanted, rel=1e-4)
    assert result.token_perplexity == pytest.approx(math.exp(-sum(w.loglikelihood for w in result.windows) / 400))


def test_an_answer_ends_with_its_first_end(model) -> None:
    for window in _domain(model).windows:
        assert 1 not in window.targets[:-1].tolist()


def test_answers_are_made_once(model, tmp_path: Path) -> None:
    first = FloatTexts(model, byte_tokenizer(), "cpu", tmp_path).chat(200, 256)

    class Silent(FloatTexts):
        def emitted(self):
            raise AssertionError("the answers are there already")

    again = Silent(model, byte_tokenizer(), "cpu", tmp_path).chat(200, 256)
    assert again.sha == first.sha
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(first.windows, again.windows, strict=True))


def test_a_damaged_file_is_made_again(model, tmp_path: Path) -> None:
    first = _domain(model, cache=tmp_path)
    (file,) = tmp_path.glob("chat-*.json")
    file.write_text("{")
    assert _domain(model, cache=tmp_path).sha == first.sha


def test_a_model_without_a_chat_template_is_refused(model) -> None:
    with pytest.raises(EvaluationError, match="no chat template"):
        chat_domain(lambda: model, byte_tokenizer(chat=False), model_key="m")


def test_a_small_budget_of_short_answers_is_written_in_one_go(model) -> None:
    """Answers are of at most 64 tokens, of which seven are 400."""
    steps: list[int] = []

    def counted(items, what, total):
        steps.append(total)
        return iter(items)

    assert _domain(model, progress=counted).tokens == 400
    assert steps[0] == 64 and len(steps) <= 2
