"""``mxfx collect`` and ``mxfx search`` on local files: what is written, and one error for each mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from mxfx.calibration.datasets import DatasetError
from mxfx.calibration.prompts import prompts
from tests.commands import Run
from tests.local_model import save_model, save_texts

_TASK = """
task: little_quiz
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: answer
doc_to_choice: ["w1", "w2"]
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
_ROWS = [{"question": " ".join(f"w{(i * j) % 90}" for j in range(1, 9)), "answer": i % 2} for i in range(8)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, _ROWS)))
    return tmp_path / "rows.jsonl"


def _ids(file: Path) -> list[list[int]]:
    return [ids[0].tolist() for ids, _ in torch.load(file, weights_only=True)["loader"]]


def test_prompts_by_source_and_template(tmp_path: Path, rows: Path) -> None:
    (tmp_path / "lines.txt").write_text("one\n\ntwo\n")
    assert list(prompts(f"txt:{tmp_path / 'lines.txt'}")) == ["one", "two"]
    assert list(prompts(f"txt:{tmp_path / 'lines.txt'}", "<{text}>")) == ["<one>", "<two>"]
    assert next(prompts(f"jsonl:{rows}:question,answer")) == f"{_ROWS[0]['question']}\n0"
    assert next(prompts(f"jsonl:{rows}", "{answer}: {question}")) == f"0: {_ROWS[0]['question']}"


@pytest.mark.parametrize(
    ("source", "template", "said"),
    [
        ("txt:nowhere.txt", None, "nowhere.txt: no such file"),
        ("jsonl:ROWS:text", None, "row 1: no 'text'; the row has question, answer"),
        ("jsonl:ROWS", "{queston}", "does not fit row 1 of .*of question, answer"),
        ("jsonl:ROWS", "{", "does not fit row 1"),
        ("jsonl:BAD", None, "bad.jsonl:1: is not JSON"),
        ("csv:x", None, "unknown data set 'csv:x'"),
    ],
)
def test_a_source_that_cannot_be_is_one_error(
    source: str, template: str | None, said: str, rows: Path, tmp_path: Path
) -> None:
    (tmp_path / "bad.jsonl").write_text("{")
    source = source.replace("ROWS", str(rows)).replace("BAD", str(tmp_path / "bad.jsonl"))
    with pytest.raises(DatasetError, match=said):
        list(prompts(source, template))


def test_collect_tokenizes_prompts_and_run_reads_the_file(
    mxfx: Run,
    model: Path,
    rows: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "calib" / "c.pt"
    given = ("--model", model, "--out", out, "--samples", 3, "--length", 16, "--template", r"w5 {question}\nw6")
    said = mxfx("collect", f"jsonl:{rows}", *given)
    assert (said.code, said.out) == (0, f"3 samples of 16 tokens of 5 prompts written to {out}\n"), said.err
    tokenizer = AutoTokenizer.from_pretrained(model)
    stream = [i for row in _ROWS for i in tokenizer(f"w5 {row['question']}\nw6")["input_ids"]]
    assert [i for ids in _ids(out) for i in ids] == stream[:48]
    again = mxfx("collect", f"jsonl:{rows}", *given)
    assert again.code == 2 and "is there already" in again.err


def test_too_few_prompts_are_a_warning_and_none_an_error(
    mxfx: Run,
    model: Path,
    rows: Path,
    tmp_path: Path,
) -> None:
    given = ("--model", model, "--samples", 9, "--out", tmp_path / "c.pt")
    few = mxfx("collect", f"jsonl:{rows}:question", *given, "--length", 16)
    assert few.code == 0 and "gives 4 samples, 9 were asked for" in few.err
    none = mxfx("collect", f"jsonl:{rows}:question", *given, "--overwrite", "--length", 100)
    assert none.code == 2 and "gives 64 tokens, and a sample is 100" in none.err
    neither = mxfx("collect", f"jsonl:{rows}:question", "--model", model)
    assert neither.code == 2 and "--out FILE or --config FILE" in neither.err


def test_a_task_of_lm_eval_is_collected_as_it_is_fed(
    mxfx: Run,
    model: Path,
    rows: Path,
    tmp_path: Path,
) -> None:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "quiz.yaml").write_text(_TASK.replace("DATA", str(rows)))
    (tmp_path / "c.toml").write_text(
        f"[token_collector]\ntarget_nsamples = 4\nseqlen = 16\nsave_path = '{tmp_path / 'c.pt'}'\n"
    )
    given = ("--model", model, "--config", tmp_path / "c.toml", "--include-path", tmp_path / "tasks")
    said = mxfx("collect", "lm_eval:little_quiz:8", *given)
    assert said.code == 0, said.err
    found = _ids(tmp_path / "c.pt")
    questions = {tuple(AutoTokenizer.from_pretrained(model)(row["question"])["input_ids"]) for row in _ROWS}
    flat = [i for ids in found for i in ids]
    assert len(found) == 4 and tuple(flat[:8]) in questions


def test_search_prints_a_line_a_round_and_a_run_reads_its_file(
    mxfx: Run,
    model: Path,
    tmp_path: Path,
) -> None:
    texts = save_texts(tmp_path / "texts", documents=4)
    (tmp_path / "p.toml").write_text(
        f"[model]\nname = '{model}'\ndtype = 'float32'\n[calibration]\nsamples = 4\nlength = 16\n"
        "[[pass]]\nname = 'annotate'\npartial = true\n[[pass.rule]]\nmatch = '.*(q|up)_proj'\n"
        "weight = 'mxint4@32'\ninput = 'mxint4@32'\n[[pass]]\nname = 'round-weights'\n"
        "[[pass]]\nname = 'insert-fake-quant'\n"
    )
    out = tmp_path / "decisions.json"
    given = (tmp_path / "p.toml", "--data", texts, "--sites", "q_proj,up_proj", "--out", out)
    first = mxfx("search", *given)
    assert first.code == 0, first.err
    assert "rotation search: nothing rotated, perplexity" in first.err
    decided = json.loads(out.read_text())
    rounds = [line for line in first.out.splitlines() if line.startswith("round ")]
    assert len(rounds) == len(decided["steps"]) >= 1
    assert f"perplexity {decided['baseline']:.4f} -> {decided['perplexity']:.4f}" in first.out
    second = mxfx("search", *given)
    assert "the same program, tokens and options were searched before" in second.out
    ids = tmp_path / "c.pt"
    assert mxfx("collect", texts, "--model", model, "--samples", 4, "--length", 16, "--out", ids).code == 0
    third = mxfx("search", tmp_path / "p.toml", "--data", ids, "--sites", "q_proj", "--out", tmp_path / "of_ids.json")
    assert third.code == 0, third.err
    assert "rotation search:" not in second.err
