"""Two models on the same tokens: paired differences with their noise, and McNemar's test."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from mxfx import cli
from mxfx.evaluation.compare import (
    compare,
    compare_runs,
    compare_samples,
    compare_scores,
    mcnemar,
    unshared,
    write_scores,
)
from mxfx.evaluation.evaluate import evaluate
from mxfx.evaluation.results import EvaluationError, Scores
from mxfx.evaluation.scoring import FloatLogits
from tests.evaluation.chatty import byte_model, byte_tokenizer


def _scores(kl: torch.Tensor, seed: int = 0) -> Scores:
    """A text of 40 windows of 50 tokens on which a model lost ``kl`` nats a token."""
    generator = torch.Generator().manual_seed(seed)
    count = kl.numel()
    targets = torch.randint(0, 9, (count,), generator=generator).int()
    top = torch.where(torch.rand(count, generator=generator) < 0.5, targets, targets + 9)
    window = torch.arange(40).repeat_interleave(count // 40).int()
    return Scores(targets, window, -2.0 - kl, top, kl, torch.where(kl > 1, top + 20, top).int())


def _kl(shift: float = 0.0, spread: float = 0.3, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(40, generator=torch.Generator().manual_seed(7)).repeat_interleave(50) * 0.2
    return (0.4 + shift + text + spread * torch.randn(2000, generator=generator)).abs()


def test_a_clear_difference_is_called_one_and_its_side_named() -> None:
    for found in compare_scores("text", _scores(_kl()), _scores(_kl(0.2, seed=1)), floor=0.01)[:2]:
        assert found.verdict == "A is better" and found.difference == pytest.approx(0.2, abs=0.05)
    for found in compare_scores("text", _scores(_kl(0.2)), _scores(_kl(seed=1)), floor=0.01)[:2]:
        assert found.verdict == "B is better"


def test_two_draws_of_one_model_are_inside_the_noise() -> None:
    calls = [
        compare_scores("text", _scores(_kl(seed=seed)), _scores(_kl(seed=seed + 100)), floor=0.0)[1].is_noise
        for seed in range(40)
    ]
    assert sum(calls) >= 34  # 95 % of 40, less two standard deviations


def test_what_another_seed_moves_is_noise_however_long_the_text() -> None:
    a = _scores(_kl())
    b = _scores(_kl() * 1.015)
    assert compare_scores("text", a, b, floor=0.0)[1].verdict == "A is better"
    assert compare_scores("text", a, b, floor=0.01)[1].verdict == "inside the noise"


@pytest.mark.parametrize("floor", [math.inf, math.nan, -0.01])
def test_a_floor_under_which_all_or_nothing_is_noise_is_refused(floor: float, tmp_path: Path) -> None:
    for compared in (compare, compare_runs):
        with pytest.raises(EvaluationError, match=rf"--floor {floor}: expected .* a number from 0 on"):
            compared(tmp_path, tmp_path, floor=floor)


def test_what_all_windows_share_is_no_noise() -> None:
    """Texts differ greatly; the second model is worse by the same in each."""
    found = compare_scores("text", _scores(_kl(spread=0)), _scores(_kl(spread=0) + 0.1), floor=0.0)[1]
    assert found.stderr == pytest.approx(0.0, abs=1e-6)
    assert found.difference == pytest.approx(0.1, abs=1e-5)


def _cut(scores: Scores, windows: int) -> Scores:
    """The first windows, 50 tokens each."""
    return Scores(*(getattr(scores, field.name)[: 50 * windows] for field in dataclasses.fields(Scores)))


def test_of_one_window_there_is_no_verdict() -> None:
    """Its error is not known: a difference of half a nat says as little as one of a thousandth."""
    a, b = _cut(_scores(_kl()), 1), _cut(_scores(_kl(0.5, seed=1)), 1)
    for found in compare_scores("text", a, b)[:2]:
        assert (found.stderr, found.verdict) == (None, "one window: no error")
    assert {found.verdict for found in compare_scores("text", a, a)} == {"inside the noise"}


def test_the_error_of_few_windows_counts_by_student_s_t() -> None:
    """Two draws of one model, three windows: by the normal law's bound, one in five would be called a difference."""
    draws = [
        compare_scores("text", _cut(_scores(_kl(seed=s)), 3), _cut(_scores(_kl(seed=s + 200)), 3), floor=0.0)[1]
        for s in range(100)
    ]
    beyond_normal = sum(abs(found.difference) > 2 * found.stderr for found in draws if found.stderr is not None)
    called = sum(not found.is_noise for found in draws)
    assert beyond_normal >= 12 and called <= 10  # 4.6 of 100 by the law, and two standard deviations


@pytest.mark.parametrize(("only_a", "only_b", "p"), [(0, 0, 1.0), (1, 0, 1.0), (0, 6, 2 / 64), (5, 5, 1.0)])
def test_mcnemar_counts_the_cases_that_differ(only_a: int, only_b: int, p: float) -> None:
    assert mcnemar(only_a, only_b) == pytest.approx(p)


def test_mcnemar_s_two_forms_meet() -> None:
    exact, normal = mcnemar(540, 460), mcnemar(541, 461)
    assert exact == pytest.approx(normal, abs=5e-3)


def test_answers_are_matched_by_document(tmp_path: Path) -> None:
    for name, right in (("a", 1.0), ("b", 0.0)):
        (tmp_path / name).mkdir()
        order = range(8) if name == "a" else reversed(range(8))
        lines = [
            json.dumps({"doc_id": i, "acc": right if i < 6 else 1.0, "target": 0, "metrics": ["acc"]}) for i in order
        ]
        (tmp_path / name / "samples-quiz.jsonl").write_text("\n".join(lines))
    (found,) = compare_samples(tmp_path / "a", tmp_path / "b")
    assert (found.domain, found.what, found.a, found.b) == ("quiz", "wrong by acc", 0.0, 0.75)
    assert found.p == pytest.approx(2 / 2**6) and found.verdict == "A is better"
    (same,) = compare_samples(tmp_path / "a", tmp_path / "a")
    assert same.p == 1.0 and same.verdict == "inside the noise"


def _keep(folder: Path, samples: list[dict]) -> Path:
    folder.mkdir()
    (folder / "samples-gsm8k.jsonl").write_text("\n".join(map(json.dumps, samples)))
    return folder


def test_answers_are_matched_by_filter_too(tmp_path: Path) -> None:
    """gsm8k scores every answer twice; one run is right by the strict filter alone, the other by both."""

    def answered(strict: float, flexible: float) -> list[dict]:
        about = {"metrics": ["exact_match"], "target": 0}
        return [
            {"doc_id": i, "filter": name, "exact_match": right, **about}
            for i in range(8)
            for name, right in (("strict-match", strict), ("flexible-extract", flexible))
        ]

    a, b = _keep(tmp_path / "a", answered(1, 0)), _keep(tmp_path / "b", answered(1, 1))
    found = {d.what: (d.a, d.b, d.verdict) for d in compare_runs(a, b)}
    assert found == {
        "wrong by exact_match,strict-match": (0, 0, "inside the noise"),
        "wrong by exact_match,flexible-extract": (1, 0, "B is better"),
    }


def test_answers_to_other_questions_cannot_be_compared(tmp_path: Path) -> None:
    """With examples before the question and without."""
    asked = {"doc_id": 0, "filter": "none", "acc": 1.0, "metrics": ["acc"]}
    a, b = (_keep(tmp_path / name, [asked | {"prompt_hash": name}]) for name in ("plain", "few-shot"))
    with pytest.raises(EvaluationError, match=r"gsm8k.*were asked in different words"):
        compare_samples(a, b)


def test_runs_are_compared_from_their_files(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("some text of no meaning, long enough for several windows. " * 8)
    model, tokenizer = byte_model(), byte_tokenizer()
    reference = FloatLogits(lambda: model)
    for seed in (1, 2):
        result = evaluate(
            byte_model(seed), tokenizer, eval_data=tmp_path / "text.txt", max_length=32, reference=reference
        )
        write_scores(tmp_path / str(seed), {"text": result})
    found = {d.what: d for d in compare(tmp_path / "1", tmp_path / "2")}
    assert set(found) == {"perplexity", "KL to float", "disagreement with float", "wrong next tokens"}
    ppl = found["perplexity"]
    assert ppl.difference == pytest.approx(math.log(ppl.b / ppl.a), rel=1e-5)
    same = compare(tmp_path / "1", tmp_path / "1")
    assert all(d.verdict == "inside the noise" and d.difference == 0 for d in same)
    assert [d.p for d in same if d.p is not None] == [1.0, 1.0]


def test_the_command_prints_a_verdict_for_every_figure(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("some text of no meaning, long enough for several windows. " * 8)
    reference = FloatLogits(byte_model)
    for seed in (1, 2):
        path = tmp_path / "text.txt"
        result = evaluate(byte_model(seed), byte_tokenizer(), eval_data=path, max_length=32, reference=reference)
        write_scores(tmp_path / str(seed), {"text": result})
    said = CliRunner().invoke(cli.app, ["compare", str(tmp_path / "1"), str(tmp_path / "1"), "--floor", "0"])
    assert said.exit_code == 0, said.output
    assert said.output.count("inside the noise") == 4 and "McNemar" in said.output
    other = CliRunner().invoke(cli.app, ["compare", str(tmp_path / "1"), str(tmp_path / "2"), "--floor", "0"])
    assert "KL to float" in other.output and "±" in other.output
    assert f"A:{tmp_path}/1,B:{tmp_path}/2" in "".join(other.output.split()), "which is which"


def test_other_text_cannot_be_compared(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"{name} text " * 20)
        result = evaluate(byte_model(), byte_tokenizer(), eval_data=tmp_path / f"{name}.txt", max_length=32)
        write_scores(tmp_path / name, {"text": result})
    with pytest.raises(EvaluationError, match="measured on different text"):
        compare(tmp_path / "a", tmp_path / "b")


def test_a_folder_without_scores_says_why_and_where_there_are_some(tmp_path: Path) -> None:
    scores = tmp_path / "out" / "a" / "scores.safetensors"
    (tmp_path / "out" / "a" / "model").mkdir(parents=True)

    def said(folder: Path) -> str:
        with pytest.raises(EvaluationError, match="no scores to compare") as caught:
            compare_runs(folder, folder)
        return str(caught.value)

    assert "there is no such folder" in said(tmp_path / "absent")
    assert "was not evaluated" in said(scores.parent)
    scores.write_bytes(b"cut short")
    assert f"in it, but in {scores.parent}; give" in said(tmp_path / "out")
    assert f"in it, but in {scores.parent}; give" in said(scores.parent / "model")
    assert "is damaged" in said(scores.parent)


def test_the_same_text_as_other_tokens_is_said_of_the_tokenizers(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("some text of no meaning " * 8)
    found = evaluate(byte_model(), byte_tokenizer(), eval_data=tmp_path / "text.txt", max_length=32)
    assert found.scores is not None
    other = dataclasses.replace(found.scores, targets=found.scores.targets + 1)
    write_scores(tmp_path / "a", {"text": found})
    write_scores(tmp_path / "b", {"text": dataclasses.replace(found, scores=other)})
    with pytest.raises(EvaluationError, match="their tokenizers differ"):
        compare(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"doc_id": 0, "metr', "cut short or changed"),
        ('{"metrics": ["acc"], "acc": 1}', "no sample of lm-eval"),
        ('{"doc_id": [1], "metrics": ["acc"]}', "no sample of lm-eval"),
        ('{"doc_id": 1, "metrics": 3}', "no sample of lm-eval"),
        ("3", "no sample of lm-eval"),
    ],
)
def test_samples_that_are_none_are_named_by_their_line(line: str, said: str, tmp_path: Path) -> None:
    folder = _keep(tmp_path / "a", [{"doc_id": 0, "acc": 1, "metrics": ["acc"]}])
    file = folder / "samples-gsm8k.jsonl"
    file.write_text(f"{file.read_text()}\n{line}")
    with pytest.raises(EvaluationError, match=rf"samples-gsm8k\.jsonl:2: .*{said}.*mxfx eval"):
        compare_runs(folder, folder)


def test_what_one_run_alone_has_is_said_and_nothing_in_common_is_an_error(tmp_path: Path) -> None:
    def answers(*documents: int) -> list[dict]:
        return [{"doc_id": i, "acc": i % 2, "metrics": ["acc"]} for i in documents]

    a, b, c = (_keep(tmp_path / name, answers(*of)) for name, of in (("a", (1, 2)), ("b", (2, 3, 4)), ("c", (5,))))
    (a / "samples-quiz.jsonl").write_text("")
    assert [one.domain for one in compare_runs(a, b)] == ["gsm8k"]
    assert unshared(a, b) == [f"quiz, of {a} alone", "3 answers of gsm8k, to questions of one alone"]
    assert unshared(a, a) == []
    with pytest.raises(EvaluationError, match="nothing in common: no question that both were asked"):
        compare_runs(b, c)
