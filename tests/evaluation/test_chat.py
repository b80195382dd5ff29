"""The domain `chat`: the float model's answers under its template, answers alone scored, made once."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from mxfx.calibration.sampling import chances, sample
from mxfx.driver.texts import FloatTexts
from mxfx.evaluation.chat import PROMPTS, _warp, chat_domain
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


def test_answers_drawn_otherwise_are_another_domain(model, tmp_path: Path) -> None:
    plain = _domain(model, cache=tmp_path)
    few = _domain(model, sampling={"top_k": 3}, cache=tmp_path)
    assert (plain.name, few.name) == ("chat", "chat:top_k=3")
    assert few.source.endswith("built-in prompts, drawn with top_k=3") and "drawn" not in plain.source
    assert few.sha != plain.sha and len(list(tmp_path.glob("chat-*.json"))) == 2
    ranks = []
    for window in few.windows:
        logits = model(window.ids[None]).logits[0, -window.scored :]
        ranks += (logits > logits.gather(1, window.targets[:, None])).sum(1).tolist()
    assert max(ranks) == 2


@pytest.mark.parametrize(
    "sampling", [{"temperature": 0.5}, {"top_k": 5, "top_p": 0.7}, {"temperature": 1.5, "min_p": 0.02}]
)
def test_answers_are_drawn_as_generate_draws_them(model, sampling: dict[str, float]) -> None:
    """One more token behind a prompt, often: shares of tokens agree with those of transformers' generate."""
    prompt, count = [5, 6, 7], 16_000
    torch.manual_seed(0)
    options = {"top_k": 0, "min_new_tokens": 1, "max_new_tokens": 1, "do_sample": True, "pad_token_id": 0} | sampling
    theirs = model.generate(torch.tensor([prompt] * count), **options)[:, -1]
    ours = sample(
        model, [prompt] * count, 1, chances(count, 1, torch.Generator().manual_seed(0)), warp=_warp(sampling)
    )[:, 0]
    shares = [torch.bincount(found, minlength=259) / count for found in (theirs, ours)]
    # min_new_tokens = 1 keeps generate from an end, which these options make unlikely.
    assert float((shares[0] - shares[1]).abs().sum()) / 2 < 0.08
    assert set(ours.unique().tolist()) <= set(theirs.unique().tolist()) or "temperature" in sampling


def test_an_answer_is_the_same_however_many_are_begun_at_once(model, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _domain(model)
    monkeypatch.setattr("mxfx.evaluation.chat.batch_of", lambda *_: 2)
    assert _domain(model).sha == whole.sha
