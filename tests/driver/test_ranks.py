"""Two processes that do one run, as torchrun starts them: the same result, and none that waits for a dead one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from mxfx.export.artefact import load
from mxfx.ground import ranks
from tests.commands import ended
from tests.local_model import save_model, save_texts

_PIPELINE = r"""
[model]
name = "MODEL"
dtype = "float32"

[calibration]
dataset = "TEXTS"
samples = 9
length = 32

[[pass]]
name = "annotate"
partial = true
  [[pass.rule]]
  match  = 'model\.layers\.\d+\..*proj'
  weight = "mxint4@32"
  input  = "mxint4@32"

[[pass]]
name = "insert-fake-quant"

[[pass]]
LAST
"""
_GPTQ = 'name = "gptq"\nasymmetric = 0.25\nbatch_size = 2'
_DISTILL = 'name = "distill"\nsteps = 6\nbatch_size = 4\ncheckpoint_every = 2'
#: Before activations are quantized.
_SEARCHES = {
    "rotation": 'name = "rotation-search"\nsamples = 4',
    "transform": 'name = "transform-search"\ncandidates = ["none", "hadamard-32", "wush-32"]',
}
_TASK = """
task: quiz
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
fewshot_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
doc_to_choice: ["w1", "w2 w3"]
metric_list:
  - metric: acc
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    save_model(folder / "model")
    save_texts(folder / "texts", documents=12, words=200)
    for name, last in {"gptq": _GPTQ, "distill": _DISTILL, **_SEARCHES}.items():
        text = _PIPELINE.replace("MODEL", str(folder / "model")).replace("TEXTS", str(folder / "texts"))
        if name in _SEARCHES:
            text = text.replace('[[pass]]\nname = "insert-fake-quant"\n', "")
        (folder / f"{name}.toml").write_text(text.replace("LAST", last))
    rows = [{"question": f"w{i} w{2 * i} w{3 * i}", "answer": i % 2} for i in range(7)]
    (folder / "quiz.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "tasks").mkdir()
    (folder / "tasks" / "quiz.yaml").write_text(_TASK.replace("DATA", str(folder / "quiz.jsonl")))
    return folder


def _command(job: Path, *files: str, out: str, more: Sequence[str] = ()) -> list[str]:
    started = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "mxfx"]
    return [*started, *_arguments(job, *files, out=out, more=more)]


def _arguments(job: Path, *files: str, out: str, more: Sequence[str] = ()) -> list[str]:
    return ["run", *(str(job / f"{name}.toml") for name in files), "--out", str(job / out), *more]


def _environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}


def _run(job: Path, *files: str, out: str, more: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    command = _command(job, *files, out=out, more=more)
    return subprocess.run(command, capture_output=True, text=True, check=False, env=_environment())


@pytest.fixture(scope="module")
def run_of_two(job: Path) -> subprocess.CompletedProcess[str]:
    """One run of everything by one process, this one, into ``one``, and one by two, into ``two``."""
    more = ["--eval", "wikitext,quiz", "--eval-data", str(job / "texts"), "--limit-tokens", "1500"]
    more += ["--include-path", str(job / "tasks"), "--num-fewshot", "1"]
    files = ("gptq", "distill", *_SEARCHES)
    with pytest.MonkeyPatch.context() as patch:
        assert ended(patch, *_arguments(job, *files, out="one", more=more)) == 0
    done = _run(job, *files, out="two", more=more)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture
def both(job: Path, run_of_two: subprocess.CompletedProcess[str]) -> Path:
    return job


def _config(job: Path, out: str, name: str) -> dict:
    (found,) = (c for c in json.loads((job / out / "results.json").read_text())["configs"] if c["name"] == name)
    return found


def _figures(job: Path, out: str, name: str) -> dict:
    return _config(job, out, name)["figures"]


def test_evaluation_is_the_same_to_1e_9(both: Path) -> None:
    one, two = (_figures(both, out, "float") for out in ("one", "two"))
    for figure in ("token_perplexity", "word_perplexity"):
        assert two[figure] == pytest.approx(one[figure], rel=1e-9)


@pytest.mark.parametrize("name", ["gptq", "distill"])
def test_perplexity_is_the_same_to_two_thousandths(both: Path, name: str) -> None:
    one, two = (_figures(both, out, name) for out in ("one", "two"))
    assert two["token_perplexity"] == pytest.approx(one["token_perplexity"], rel=2e-3)


def test_weights_are_the_same_on_the_grid_in_999_of_1000_elements(both: Path) -> None:
    one, two = (load(both / out / "gptq" / "model").weights for out in ("one", "two"))
    assert set(one) == set(two)
    different = sum(int((one[name] != two[name]).sum()) for name in one)
    assert different <= sum(tensor.numel() for tensor in one.values()) / 1000


@pytest.mark.parametrize("name", _SEARCHES)
def test_trials_that_are_spread_decide_as_those_of_one_process(both: Path, name: str) -> None:
    one, two = (
        next(p["details"] for p in _config(both, out, name)["passes"] if p["pass"].endswith("-search"))
        for out in ("one", "two")
    )
    # Moments that a transform is made of are summed in float32, by each rank over its samples: a few codes flip.
    assert two == _nearly(one, 1e-9 if name == "rotation" else 1e-2)
    if name == "transform":
        for site, decision in one["sites"].items():
            errors = two["sites"][site]["errors"]
            assert all(errors[c] == pytest.approx(decision["errors"][c], rel=1e-9) for c in ("none", "hadamard-32"))
    if name == "rotation":
        assert list(two["steps"][0]["perplexity"]) == list(one["steps"][0]["perplexity"])
        assert len(two["steps"][0]["perplexity"]) > 2, "each process had trials"
    weights = [load(both / out / name / "model").weights for out in ("one", "two")]
    for key, weight in weights[0].items():
        apart = 0.0 if name == "rotation" else 2e-3 * float(weight.abs().max())
        torch.testing.assert_close(weights[1][key], weight, rtol=0.0, atol=apart)


def _nearly(value: object, apart: float = 1e-9) -> object:
    """Numbers equal to a part of them, all else the same."""
    if isinstance(value, dict):
        return {key: _nearly(one, apart) for key, one in value.items()}
    if isinstance(value, list):
        return [_nearly(one, apart) for one in value]
    return pytest.approx(value, rel=apart) if isinstance(value, float) else value


def test_a_task_that_is_spread_gives_what_one_process_gives(both: Path) -> None:
    outs = ("one", "two")
    one, two = (_config(both, out, "rotation")["evaluation"]["tasks"]["quiz"] for out in outs)
    assert two["metrics"] == _nearly(one["metrics"]) and two["stderr"] == _nearly(one["stderr"])
    files = [sorted((both / out).rglob("samples-quiz.jsonl")) for out in outs]
    assert len(files[0]) == len(files[1]) > 0
    for first, second in zip(*files, strict=True):
        rows = [[json.loads(line) for line in file.read_text().splitlines()] for file in (first, second)]
        # Transforms are made of moments that are summed in another order.
        apart = 1e-5 if first.parent.name == "transform" else 1e-9
        assert rows[1] == _nearly(rows[0], apart) and len(rows[0]) == 7


def test_decisions_that_only_the_first_process_finds_hold_for_all(both: Path, tmp_path: Path) -> None:
    """``two`` stays as it is: other tests look at it."""
    out = tmp_path / "again"
    shutil.copytree(both / "two" / "rotation", out / "rotation")
    done = _run(both, "rotation", out=str(out))
    assert done.returncode == 0, done.stderr[-3000:]
    (found,) = (p for p in _config(both, str(out), "rotation")["passes"] if p["pass"] == "rotation-search")
    assert found["details"]["from_file"]


def test_the_first_process_alone_writes_and_prints(run_of_two: subprocess.CompletedProcess[str]) -> None:
    assert run_of_two.stdout.count("Perplexity of the emitted models") == 1
    assert run_of_two.stderr.count("written to") == 1


def test_a_wrong_file_is_said_once(job: Path) -> None:
    (job / "wrong.toml").write_text((job / "gptq.toml").read_text().replace('"gptq"', '"gptk"'))
    done = _run(job, "wrong", out="wrong")
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1 and "gptk" in done.stderr
    assert done.stdout == ""


def _children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in found.read_text().split()] if found.exists() else []


def _killed(job: Path, out: str, file: str, which: int, when: str) -> str:
    """Kill one of two processes once the run's cache holds a file of that pattern; what was said."""
    run = subprocess.Popen(
        _command(job, file, out=out), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=_environment()
    )
    while run.poll() is None and not list((job / out).rglob(when)):
        time.sleep(0.02)
    workers = sorted(_children(run.pid))
    assert run.poll() is None and len(workers) >= 2, "the run ended before it was killed"
    os.kill(workers[which], signal.SIGKILL)
    _, said = run.communicate(timeout=120)
    assert run.returncode != 0
    return said


@pytest.mark.parametrize(
    ("file", "which", "when"),
    [("gptq", 0, "manifest.jsonl"), ("distill", 1, "distill-*.safetensors")],
)
def test_a_killed_process_ends_all_with_one_message_and_the_next_start_goes_on(
    both: Path, job: Path, file: str, which: int, when: str
) -> None:
    out = f"killed-{file}-{which}"
    said = _killed(job, out, file, which, when)
    assert said.count("another process of this run ended") == 1
    done = _run(job, file, out=out)
    assert done.returncode == 0, done.stderr[-3000:]
    whole, resumed = (load(job / folder / file / "model").weights for folder in ("two", out))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


# -- with one process everything is the identity ---------------------------------------------------------------------


@pytest.fixture
def three(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(ranks, "_now", ranks._Together(1, 3, False))
    yield


def test_alone_it_is_the_identity() -> None:
    x = torch.arange(6.0)
    assert ranks.summed(x) is x and ranks.joined(x, 0, 6) is x
    assert ranks.collected(3) == [3] and ranks.from_first(lambda: 4) == 4 and ranks.share(5) == slice(0, 5)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 9])
def test_shares_are_all_and_each_once(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for rank in range(3):
        monkeypatch.setattr(ranks, "_now", ranks._Together(rank, 3, rank == 0))
        found += range(count)[ranks.share(count)]
    assert found == list(range(count))


def test_what_is_done_alone_meets_nobody(three: None) -> None:
    with ranks.alone():
        assert ranks.world() == 1 and ranks.share(5) == slice(0, 5)
        assert not ranks.is_first(), "only the first writes, whatever it works on"
    assert ranks.world() == 3
