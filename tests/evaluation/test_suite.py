"""What `--eval` asks for: names, files, chat and tasks of lm-eval, read once and measured on every model."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from mxfx.evaluation import tasks
from mxfx.evaluation.compare import compare, compare_samples
from mxfx.evaluation.evaluate import evaluate, text_domain
from mxfx.evaluation.results import EvaluationError
from mxfx.evaluation.scoring import FloatLogits
from mxfx.evaluation.suite import Suite
from mxfx.evaluation.tasks import TaskOptions
from mxfx.evaluation.wanted import Wanted, title
from tests.evaluation.chatty import byte_model, byte_tokenizer

TASK = """
task: little_quiz
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: answer
doc_to_choice: ["yes", "no"]
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="module")
def model():
    return byte_model()


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    (tmp_path / "news.txt").write_text("news of the day, a long text without any meaning at all. " * 4)
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "a.txt").write_text("def f(x):\n    return x + 1\n" * 6)
    return tmp_path


@pytest.fixture
def quiz(tmp_path: Path) -> TaskOptions:
    rows = [{"question": f"Is {i} even? ", "answer": i % 2} for i in range(12)]
    (tmp_path / "quiz.jsonl").write_text("\n".join(map(json.dumps, rows)))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "quiz.yaml").write_text(TASK.replace("DATA", str(tmp_path / "quiz.jsonl")))
    return TaskOptions(limit=10, include_path=folder)


def test_every_text_is_a_domain_of_its_own(model, texts: Path) -> None:
    wanted = Wanted.parse(f"{texts / 'news.txt'},{texts / 'code'}", limit_tokens=150, domain_tokens=60, max_length=64)
    suite = Suite(wanted, byte_tokenizer(), 512)
    reference = FloatLogits(lambda: model)
    of_float = suite.run(reference.model, reference)
    other = suite.run(byte_model(1), reference)
    assert list(other.domains) == ["news", "code"]
    assert 120 < other.domains["news"].tokens <= 150 and 40 < other.domains["code"].tokens <= 60
    assert of_float.first.divergence is None
    alone = evaluate(byte_model(1), byte_tokenizer(), eval_data=texts / "news.txt", limit_tokens=150, max_length=64)
    assert other.first.token_perplexity == pytest.approx(alone.token_perplexity, rel=1e-6)
    assert all(result.divergence.mean > 0 for result in other.domains.values())


def test_an_evaluation_survives_json_but_for_its_tokens(model, texts: Path) -> None:
    suite = Suite(Wanted.parse(str(texts / "news.txt"), max_length=64), byte_tokenizer(), 512)
    found = suite.run(byte_model(1), FloatLogits(lambda: model))
    data = json.loads(json.dumps(found.to_json(), allow_nan=False))["domains"]["news"]
    assert "scores" not in data and data["token_perplexity"] == found.first.token_perplexity
    assert data["divergence"]["mean"] == found.first.divergence.mean


def test_runs_that_were_written_are_compared(model, texts: Path, tmp_path: Path) -> None:
    suite = Suite(Wanted.parse(str(texts / "news.txt"), max_length=64), byte_tokenizer(), 512)
    reference = FloatLogits(lambda: model)
    for seed in (1, 2):
        (tmp_path / str(seed)).mkdir()
        suite.run(byte_model(seed), reference).write(tmp_path / str(seed))
    assert {d.domain for d in compare(tmp_path / "1", tmp_path / "2")} == {"news"}


def test_a_task_of_lm_eval_runs_by_name(model, quiz: TaskOptions, tmp_path: Path) -> None:
    wanted = Wanted.parse("little_quiz", tasks=quiz)
    wanted.check()
    suite = Suite(wanted, byte_tokenizer(), 512)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        found = suite.run(model)
        found.write(tmp_path / name)
    result = found.tasks["little_quiz"]
    assert found.first is None and 0 <= result.metrics["acc"] <= 1 and result.stderr["acc"] > 0
    kept = (tmp_path / "a" / "samples-little_quiz.jsonl").read_text().splitlines()
    assert len(kept) == 10
    assert result.metrics["acc"] == sum(json.loads(line)["acc"] for line in kept) / 10
    (same,) = compare_samples(tmp_path / "a", tmp_path / "b")
    assert same.what == "wrong by acc" and same.p == 1.0
    assert json.loads(json.dumps(result.to_json()))["options"]["limit"] == 10


def test_few_shot_examples_and_the_chat_template_reach_the_task(model, quiz: TaskOptions, tmp_path: Path) -> None:
    import dataclasses

    options = dataclasses.replace(quiz, limit=2, num_fewshot=1, apply_chat_template=True)
    found = Suite(Wanted.parse("little_quiz", tasks=options), byte_tokenizer(), 512).run(model).tasks["little_quiz"]
    context = found.samples["little_quiz"][0]["arguments"][0][0]
    assert context.count("Is ") == 2 and context.startswith("<turn>")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("wikitext,,chat", "one comma between two"),
        ("a/news.txt,b/news.txt", "'news' would name two results"),
        ("chat:top_k=2.5", r"chat:top_k=2.5: 'top_k=2.5'; expected .* of top_k a whole one"),
        ("chat:temperature=0", "'temperature=0'; expected .* above 0"),
        ("chat:top_p=1", "'top_p=1'"),
        ("chat:top_k=5+top_k=6", "'top_k=6'; expected each once"),
        ("chat:", "''; expected"),
        ("wikitxt", r"^--eval wikitxt: no file or folder, [^\n]* a path or a task; did you mean 'wikitext'\?$"),
        ("nothing-like-it", r"^--eval nothing-like-it: no file or folder, [^\n]* a path or a task$"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_a_model_is_read(
    text: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Reading lm-eval's thousands of tasks takes ten seconds.
    monkeypatch.setattr(tasks, "_all_tasks", lambda: SimpleNamespace(all_tasks=["arc_easy", "wikitext"]))
    with pytest.raises(EvaluationError, match=message):
        Wanted.parse(text).check()


def test_a_folder_gives_its_whole_name_and_a_file_its_stem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [tmp_path / "code-3.11", tmp_path / "code-3.12"]
    for folder in folders:
        folder.mkdir()
    Wanted.parse(",".join(map(str, folders)))
    monkeypatch.chdir(folders[0])
    assert [title(name) for name in (str(folders[1]), ".", "news.v2.txt")] == ["code-3.12", "code-3.11", "news.v2"]


def test_chat_is_drawn_as_its_name_says() -> None:
    asked: list[dict[str, float]] = []

    def chat(limit: int | None, length: int, how: dict[str, float]):
        asked.append(how)
        return SimpleNamespace(name="")

    suite = Suite(Wanted.parse("chat,chat:top_p=0.9+temperature=0.7"), byte_tokenizer(), 512, chat)
    assert asked == []
    assert len(suite.domains) == 2 and asked == [{}, {"temperature": 0.7, "top_p": 0.9}]


def test_chat_needs_the_float_model() -> None:
    with pytest.raises(EvaluationError, match="needs the float model"):
        Suite(Wanted.parse("chat"), byte_tokenizer(), 512)


def test_local_documents_without_wikitext_are_refused(texts: Path) -> None:
    with pytest.raises(EvaluationError, match="--eval-data gives the text of wikitext"):
        Wanted.parse("chat", eval_data=str(texts / "news.txt")).check()


def test_text_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="no such file or folder"):
        text_domain("x", byte_tokenizer(), path=tmp_path / "absent.txt")
