"""lm-eval's own command opens the folder of a run and finds the figures that ``mxfx eval`` finds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mxfx.evaluation.compare import samples_in
from tests.commands import Run
from tests.local_model import save_model

_FILES = {
    "mxint4": 'weight = "mxint4@32/mse"\n  input = "mxint4@32/mse"',
    "mxfp4": 'weight = "mxfp4_e2m1@32/mse"\n  input = "mxfp4_e2m1@32/mse"',
}
_PIPELINE = """
[model]
name = "MODEL"
dtype = "float32"
[[pass]]
name = "fuse-norm"
[[pass]]
name = "annotate"
  [[pass.rule]]
  match = '.*_proj'
  FORMATS
  [[pass.rule]]
  match = '.*self_attn'
  kv = "mxint4@16/mse"
[[pass]]
name = "round-weights"
[[pass]]
name = "insert-fake-quant"
[[pass]]
name = "quantize-kv-cache"
"""
_TASK = """
task: little_quiz
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: answer
doc_to_choice: ["w1 w2", "w3", "w4 w5 w6"]
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
_TEXT = """
task: little_text
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
process_results: !function count.words
"""
_COPY = """
task: little_copy
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{question}}"
generation_kwargs: {until: ["w0"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
_COUNT = """
def words(doc, results):
    (likelihood,) = results
    return {"word_perplexity": (likelihood, len(doc["question"].split()))}
"""


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    rows = [{"question": " ".join(f"w{(i * j) % 90}" for j in range(1, 12)), "answer": i % 3} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "count.py").write_text(_COUNT)
    for name, text in (("quiz", _TASK), ("text", _TEXT), ("copy", _COPY)):
        (folder / f"{name}.yaml").write_text(text.replace("DATA", str(tmp_path / "rows.jsonl")))
    return folder


@pytest.mark.parametrize("name", _FILES)
def test_lm_eval_finds_the_figures_of_mxfx_eval(name: str, mxfx: Run, tasks: Path, tmp_path: Path) -> None:
    model = save_model(tmp_path / "llama")
    file = tmp_path / f"{name}.toml"
    file.write_text(_PIPELINE.replace("MODEL", str(model)).replace("FORMATS", _FILES[name]))
    wanted = ("--eval", "little_quiz,little_text,little_copy", "--include-path", tasks)
    said = mxfx("run", file, *wanted, "--out", tmp_path / "out")
    assert said.code == 0, said.err
    results = json.loads((tmp_path / "out" / "results.json").read_text())["configs"]
    mine = next(config for config in results if config["name"] == name)["evaluation"]["tasks"]
    opened = f"pretrained={tmp_path / 'out' / name / 'model'},trust_remote_code=True,softmax_dtype=float32"
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", opened, "--device", "cpu"]
    command += [
        "--tasks",
        "little_quiz,little_text,little_copy",
        "--include_path",
        str(tasks),
        "--log_samples",
        "--output_path",
        str(tmp_path / "theirs"),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=400, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (answers,) = (tmp_path / "theirs").rglob("samples_little_copy_*.jsonl")
    read = [json.loads(line)["resps"] for line in answers.read_text().splitlines()]
    assert read == [sample["resps"] for sample in samples_in(tmp_path / "out" / name)["little_copy"]]
    assert len({str(answer) for answer in read}) > len(read) // 2
    (written,) = (tmp_path / "theirs").rglob("results_*.json")
    theirs = json.loads(written.read_text())["results"]
    for task, metric in (("little_quiz", "acc"), ("little_quiz", "acc_norm"), ("little_text", "word_perplexity")):
        assert theirs[task][f"{metric},none"] == pytest.approx(mine[task]["metrics"][metric], rel=1e-6), metric
