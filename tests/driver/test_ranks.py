"""Two processes that do one run, as torchrun starts them: the same result, and none that waits for a dead one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mxfx.export.artefact import load
from mxfx.ground import ranks
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


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    save_model(folder / "model")
    save_texts(folder / "texts", documents=12, words=200)
    for name, last in (("gptq", _GPTQ), ("distill", _DISTILL)):
        text = _PIPELINE.replace("MODEL", str(folder / "model")).replace("TEXTS", str(folder / "texts"))
        (folder / f"{name}.toml").write_text(text.replace("LAST", last))
    return folder


def _command(job: Path, processes: int, *files: str, out: str) -> list[str]:
    python = [sys.executable, "-m"]
    if processes > 1:
        python += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    evaluated = ["--eval", "wikitext", "--eval-data", str(job / "texts"), "--limit-tokens", "1500"]
    return [*python, "mxfx", "run", *(str(job / f"{name}.toml") for name in files), "--out", str(job / out), *evaluated]


def _environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}


def _run(job: Path, processes: int, *files: str, out: str) -> subprocess.CompletedProcess[str]:
    command = _command(job, processes, *files, out=out)
    return subprocess.run(command, capture_output=True, text=True, check=False, env=_environment())


@pytest.fixture(scope="module")
def both(job: Path) -> Path:
    for processes, out in ((1, "one"), (2, "two")):
        done = _run(job, processes, "gptq", "distill", out=out)
        assert done.returncode == 0, done.stderr[-3000:]
    return job


def _figures(job: Path, out: str, name: str) -> dict:
    (found,) = (c for c in json.loads((job / out / "results.json").read_text())["configs"] if c["name"] == name)
    return found["figures"]


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


def test_the_first_process_alone_writes_and_prints(both: Path, job: Path) -> None:
    done = _run(job, 2, "gptq", out="two")
    assert done.returncode == 0
    assert done.stdout.count("Perplexity of the emitted models") == 1
    assert done.stderr.count("written to") == 1


def test_a_wrong_file_is_said_once(job: Path) -> None:
    (job / "wrong.toml").write_text((job / "gptq.toml").read_text().replace('"gptq"', '"gptk"'))
    done = _run(job, 2, "wrong", out="wrong")
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1 and "gptk" in done.stderr
    assert done.stdout == ""


def _children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in found.read_text().split()] if found.exists() else []


def _killed(job: Path, out: str, file: str, which: int, when: str) -> str:
    """Kill one of two processes once the run's cache holds a file of that pattern; what was said."""
    run = subprocess.Popen(
        _command(job, 2, file, out=out), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=_environment()
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
    [("gptq", 1, "manifest.jsonl"), ("gptq", 0, "manifest.jsonl"), ("distill", 1, "distill-*.safetensors")],
)
def test_a_killed_process_ends_all_with_one_message_and_the_next_start_goes_on(
    both: Path, job: Path, file: str, which: int, when: str
) -> None:
    out = f"killed-{file}-{which}"
    said = _killed(job, out, file, which, when)
    assert said.count("another process of this run ended") == 1
    done = _run(job, 2, file, out=out)
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
