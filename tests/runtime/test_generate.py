"""Text out of models: ``mxfx generate``, ``check --context``, a task of lm-eval, scores of decoding."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from mxfx import cli
from mxfx.config import Pipeline
from mxfx.driver.generate import GenerateError, open_model, write
from mxfx.driver.pretrained import load_model, load_tokenizer
from mxfx.graph.program import Program
from mxfx.graph.trace import trace
from mxfx.ops.kernels.packed import inexact_rows
from mxfx.pipeline.manager import PassManager
from mxfx.runtime.causal_lm import as_causal_lm
from mxfx.runtime.stepwise import Stepwise
from tests.local_model import save_model, save_texts
from tests.programs import config_a, padded_batch, passed, raised, relative

D = r"""
[model]
name = "MODEL"
dtype = "float32"
[[pass]]
name = "annotate"
  [[pass.rule]]
  match = 'model\.layers\.\d+\..*proj'
  weight = "mxint4@32"
  input = "mxint4@32"
  [[pass.rule]]
  match = 'model\.layers\.\d+\.self_attn'
  kv = "mxint4@16"
[[pass]]
name = "round-weights"
[[pass]]
name = "insert-fake-quant"
[[pass]]
name = "quantize-kv-cache"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def mxfx(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mxfx", *map(str, args)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        captured = capsys.readouterr()
        return int(exit_.value.code or 0), captured.out, captured.err

    return run


def test_a_saved_run_and_a_float_model_write_text_and_say_how_fast(folder, mxfx, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("d.toml").write_text(D.replace("MODEL", str(folder)))
    assert mxfx("run", "d.toml", "--out", "out")[0] == 0
    for model in ("out", folder):
        code, said, speed = mxfx("generate", model, "--prompt", "w3 w5 w8", "--max-new-tokens", 9, "--greedy")
        assert code == 0, speed
        assert re.fullmatch(r"(w\d+ ?)+\n", said), said
        assert re.search(r"\d+ tokens, the first after [\d.]+ s, then [\d.]+ tokens/s", speed), speed
    assert said.split() == _greedy(folder)
    monkeypatch.setattr("sys.stdin", io.StringIO("w3 w5 w8\n"))
    code, read, _ = mxfx("generate", folder, "--prompt", "-", "--max-new-tokens", 9, "--greedy")
    assert (code, read) == (0, said)


def _greedy(folder: Path) -> list[str]:
    model, tokenizer = load_model(folder, "float32"), load_tokenizer(folder)
    ids = tokenizer("w3 w5 w8", return_tensors="pt")["input_ids"]
    return tokenizer.decode(
        model.generate(ids, max_new_tokens=9, do_sample=False)[0, 3:], skip_special_tokens=True
    ).split()


def test_a_prompt_that_cannot_be_is_one_error(folder: Path, mxfx) -> None:
    model, tokenizer = open_model(folder)
    with pytest.raises(GenerateError, match="has no chat template"):
        write(model, tokenizer, "w3", chat=True)
    with pytest.raises(GenerateError, match="has no tokens"):
        write(model, tokenizer, "")
    with pytest.raises(GenerateError, match="300 tokens, the model reads at most 256"):
        write(model, tokenizer, "w3 " * 300)
    assert mxfx("generate", folder, "--prompt", "", "--greedy")[0] == 2


def test_the_chat_template_frames_the_prompt(folder: Path) -> None:
    model, tokenizer = open_model(folder)
    tokenizer.chat_template = "{% for m in messages %}w1 {{ m.content }} w2{% endfor %}"
    framed = write(model, tokenizer, "w9", chat=True, max_new_tokens=5, sample=False)
    assert framed.text == write(model, tokenizer, "w1 w9 w2", max_new_tokens=5, sample=False).text


def test_check_says_what_a_cache_takes(folder: Path, mxfx, tmp_path: Path) -> None:
    pipeline = tmp_path / "d.toml"
    pipeline.write_text(D.replace("MODEL", str(folder)))
    code, said, err = mxfx("check", pipeline, "--context", 100000, "--batch", 8)
    assert code == 0, err
    # 2 layers × keys and values × 2 heads × 16 channels: 8 bytes of codes and a scale, or 64 bytes.
    assert f"cache: {8 * 100000 * 8 * 9 / 1e9:.3f} GB for 8 × 100,000 tokens; in float32 0.410 GB" in said


def copying(folder: Path) -> Path:
    """A task of lm-eval: repeat two words, one example before each."""
    rows = [{"question": f"w{i} w{i + 3} again :", "answer": f"w{i} w{i + 3}"} for i in range(4, 60, 4)]
    data = folder / "copy.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "copy.yaml").write_text(
        f"""
task: copying
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
output_type: generate_until
test_split: test
fewshot_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
num_fewshot: 1
generation_kwargs: {{until: ["w0"], max_gen_toks: 6, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
    )
    return folder


@pytest.mark.parametrize("quantized", [False, True])
def test_a_generating_task_has_the_same_answers_in_batches(quantized: bool, folder: Path, tmp_path: Path) -> None:
    program = raised_from(folder)
    program = passed(program, config_a()) if quantized else program
    tasks = TaskManager(include_path=str(copying(tmp_path)), include_defaults=False)
    answers = []
    for batch in (1, 8):
        lm = HFLM(pretrained=as_causal_lm(program), tokenizer=load_tokenizer(folder), batch_size=batch)
        found = simple_evaluate(lm, tasks=["copying"], task_manager=tasks, log_samples=True, bootstrap_iters=0)
        assert "exact_match,none" in found["results"]["copying"]
        answers.append([sample["resps"] for sample in found["samples"]["copying"]])
    assert answers[0] == answers[1] and len({str(answer) for answer in answers[0]}) > 1


def raised_from(folder: Path) -> Program:
    return PassManager().run(trace(load_model(folder, "float32")), Pipeline([]).completed()).program


def test_a_text_read_token_by_token_has_the_logits_of_a_whole_one() -> None:
    lm, (ids, mask, _) = as_causal_lm(raised("gemma3-tiny")), padded_batch()
    with torch.no_grad():
        steps, whole = (of(ids, attention_mask=mask).logits[mask.bool()] for of in (Stepwise(lm), lm))
    assert relative(steps, whole) < 1e-5


def test_decoding_is_scored_from_the_files_of_a_run(folder: Path, mxfx, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("d.toml").write_text(D.replace("MODEL", str(folder)))
    save_texts(Path("texts"))
    assert mxfx("run", "d.toml", "--out", "out")[0] == 0
    said = [mxfx("eval", "out", "--eval-data", "texts", "--phase", phase) for phase in ("prefill", "decode")]
    assert [code for code, _, _ in said] == [0, 0], said
    figures = [re.findall(r"\d+\.\d\d", out) for _, out, _ in said]
    assert figures[0][:1] == figures[1][:1] != []
    assert mxfx("eval", "out", "--phase", "both")[0] == 2


def test_rows_that_lost_something_while_text_was_written_are_told(folder: Path) -> None:
    model, tokenizer = open_model(folder)
    plain = write(model, tokenizer, "w3", max_new_tokens=3, sample=False)
    assert plain.warnings == () and "warning" not in str(plain)
    count = inexact_rows(torch.device("cpu"))
    told = write(model, tokenizer, "w3", max_new_tokens=3, sample=False, say=lambda piece: count.add_(1) and None)
    assert len(told.warnings) == 1 and "warning: " in str(told) and "span more octaves" in str(told)
