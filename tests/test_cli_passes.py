"""The commands for working with passes: opt, bisect, repro, weights, and what a run says of each pass."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from mxfx.config import RAISE_PASSES
from mxfx.rewrite import Context, Exact, Lossy, Numerics, Pass, Rewriter
from mxfx.rewrite.pass_ import _REGISTRY, register
from tests.commands import Run
from tests.local_model import save_model

PIPELINE = r"""
[model]
name = "MODEL"
dtype = "float32"

[[pass]]
name = "fuse-norm"

[[pass]]
name = "annotate"
  [[pass.rule]]
  match  = '.*_proj'
  weight = "mxint4@32"

[[pass]]
name = "round-weights"
"""
RAISED = "raise-norm,raise-rope,raise-attention"


@dataclass(frozen=True)
class FailsAtOutput(Pass):
    """Fails at the first output projection."""

    name: ClassVar[str] = "fails-at-output"
    numerics: ClassVar[Numerics] = Lossy()

    def run(self, rw: Rewriter, ctx: Context) -> None:
        for node in rw.program.nodes("linear"):
            if "o_proj" in rw.program.weight_of(node):
                raise ArithmeticError("no output projection can be solved")


@dataclass(frozen=True)
class Doubles(Pass):
    """Doubles a weight and promises that nothing changes."""

    name: ClassVar[str] = "doubles"
    numerics: ClassVar[Numerics] = Exact()

    def run(self, rw: Rewriter, ctx: Context) -> None:
        name = "model.layers.1.mlp.down_proj.weight"
        if rw.match(next(rw.program.nodes("linear"))):
            rw.set_weight(name, rw.weights.master(name) * 2)


#: Where ``round-weights`` stands in the pipeline below, behind the raise passes.
ROUNDING = len(RAISE_PASSES) + 3


@pytest.fixture(autouse=True)
def plugged_in() -> Iterator[None]:
    known = dict(_REGISTRY)
    register(FailsAtOutput)
    register(Doubles)
    yield
    _REGISTRY.clear()
    _REGISTRY.update(known)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def pipeline(tmp_path: Path, model: Path) -> Path:
    file = tmp_path / "p.toml"
    file.write_text(PIPELINE.replace("MODEL", str(model)))
    return file


def test_opt_prints_two_short_regions_for_two_passes(mxfx: Run) -> None:
    said = mxfx("opt", "llama-tiny", "--passes", "raise-norm,fuse-norm", "--print-ir-after-change")
    assert said.code == 0, said.err
    assert [line[:9] for line in said.out.splitlines() if line.startswith("// ")] == ["// pass 1", "// pass 2"]
    assert len(said.out.splitlines()) < 60


def test_opt_prints_single_matches_and_says_so_in_its_help(mxfx: Run) -> None:
    said = mxfx("opt", "llama-tiny", "--passes", "raise-norm,fuse-norm", "--print-ir-per-match")
    assert said.code == 0, said.err
    assert [said.out.count(f"// pass {number} ") for number in (1, 2)] == [5, 5]
    assert "match 5 of 5 at model.norm" in said.out and "apart from" not in said.out
    assert "--print-ir-per-match" in mxfx("opt", "--help").out


def test_opt_reads_what_it_printed_comments_and_all(mxfx: Run, tmp_path: Path) -> None:
    first = mxfx("opt", "llama-tiny", "--passes", "raise-norm", "--timing", "--verify-each")
    assert first.code == 0 and "// 1 raise-norm" in first.out
    graph = tmp_path / "graph.mxir"
    graph.write_text(first.out)
    second = mxfx("opt", graph)
    assert first.out.startswith(second.out)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["lama-tiny"], "did you mean 'llama-tiny'"),
        (["llama-tiny", "--passes", "raise-nrom"], "did you mean 'raise-norm'?"),
        (["llama-tiny", "--passes", "raise-norm", "--stop-after", "x"], "--stop-after: 'x' is no stop point"),
        (["llama-tiny", "--passes", "raise-norm", "--print-ir-after", "lower"], "no pass 'lower' in this pipeline"),
        (["llama-tiny", "--dtype", "fp8"], "unknown dtype 'fp8'"),
        (["llama-tiny", "--passes", "rotate-residual"], "requires 'norms-fused'"),
    ],
)
def test_a_mistake_in_opt_is_one_error(mxfx: Run, given: list[str], said: str) -> None:
    answer = mxfx("opt", *given)
    assert answer.code == 2 and said in " ".join(answer.err.split()) and "Traceback" not in answer.err


def test_a_run_says_what_each_pass_did_and_lost(mxfx: Run, pipeline: Path, tmp_path: Path) -> None:
    said = mxfx("run", pipeline, "--out", tmp_path / "out", "-v")
    assert said.code == 0, said.err
    assert "KL nats" in said.out and "SQNR dB" in said.out
    assert "close, error " in said.out
    assert f"{ROUNDING} round-weights: 14 matched" in said.out and "ledger: kl " in said.out
    (_, config) = json.loads((tmp_path / "out/results.json").read_text())["configs"]
    assert config["passes"][ROUNDING - 1]["findings"]["ledger"]["kl"] > 0
    assert {"model.layers.*.mlp.up_proj"} < {row["path"] for row in config["coverage"]["operands"]}
    folders = sorted(path.name for path in (tmp_path / "out/p/ir").iterdir())
    assert folders[:2] == ["000_trace", "001_raise-norm"] and folders[-1] == "index.md"


def test_skips_come_with_their_reason(mxfx: Run, tmp_path: Path) -> None:
    file = tmp_path / "q.toml"
    file.write_text(PIPELINE.replace("MODEL", str(save_model(tmp_path / "qwen3", "qwen3-tiny"))))
    said = mxfx("run", file, "-v")
    assert "skipped model.layers.0.self_attn.q_norm, " in said.out and "which is no linear" in said.out


def test_weights_answers_who_changed_a_weight(mxfx: Run, pipeline: Path, tmp_path: Path) -> None:
    assert mxfx("run", pipeline, "--out", tmp_path / "out").code == 0
    up = mxfx("weights", tmp_path / "out", "--changed", "model.layers.1.mlp.up_proj.weight").out.splitlines()
    assert [line.split(":")[0] for line in up] == ["fuse-norm", "round-weights"]
    assert up[0].split(" → ")[1].split(",")[0] == up[1].split(": ")[1].split(" → ")[0]
    assert "relative change 0." in up[1]
    tied = mxfx("weights", tmp_path / "out", "--changed", "lm_head.weight").out.splitlines()
    assert [line.split(":")[0] for line in tied] == ["fuse-norm", "fuse-norm"]
    assert mxfx("weights", tmp_path / "out").out.count("round-weights") == 14
    wrong = mxfx("weights", tmp_path / "out", "--changed", "model.layers.1.mlp.up_porj.weight")
    assert wrong.code == 2 and "did you mean 'model.layers.1.mlp.up_proj.weight'" in wrong.err


def test_bisect_names_pass_and_match_and_prints_commands_that_run(mxfx: Run, pipeline: Path, tmp_path: Path) -> None:
    assert mxfx("run", pipeline, "--out", tmp_path / "out").code == 0
    said = mxfx("bisect", tmp_path / "out", "--max-kl", "0.01")
    assert said.code == 0, said.err
    assert said.out.startswith(f"pass {ROUNDING} 'round-weights', match ")
    before, after = (line.split(": ", 1)[1] for line in said.out.splitlines()[1:])
    import shlex

    shown = [mxfx(*shlex.split(command)[1:]) for command in (before.strip(), after.strip())]
    assert [answer.code for answer in shown] == [0, 0]
    assert shown[0].out.count("rounded") + 1 == shown[1].out.count("rounded")
    halved = mxfx("bisect", pipeline, "--max-kl", "0.01", "--set", "model.dtype=bfloat16")
    assert "--dtype float32" in before and halved.out.count("--dtype bfloat16") == 2
    nothing = mxfx("bisect", pipeline, "--max-kl", "1e6")
    assert nothing.code == 1 and "lower the threshold" in nothing.err


def test_a_failure_leaves_a_reproducer_that_repro_runs_and_shrinks(mxfx: Run, pipeline: Path, tmp_path: Path) -> None:
    pipeline.write_text(pipeline.read_text() + '\n[[pass]]\nname = "fails-at-output"\n')
    said = mxfx("run", pipeline, "--out", tmp_path / "out")
    assert said.code == 2 and "no output projection can be solved" in said.err
    folder = tmp_path / "out" / "p" / "repro"
    assert f"mxfx repro {folder}" in said.err
    again = mxfx("repro", folder, "--shrink")
    assert again.code == 0 and again.out.startswith("reproduced: PassError") and "cut to 1 layer" in again.out
    _REGISTRY[FailsAtOutput.name] = Doubles
    assert mxfx("repro", folder).code == 1


def test_a_broken_promise_stops_the_run_with_exit_code_1(mxfx: Run, pipeline: Path) -> None:
    pipeline.write_text(pipeline.read_text() + '\n[[pass]]\nname = "doubles"\n')
    said = mxfx("run", pipeline)
    assert said.code == 1 and "promises bit-equal logits" in said.err and "model.layers.1.mlp.down_proj" in said.err


def test_opt_reads_from_a_pipe_what_it_printed(mxfx: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    printed = mxfx("opt", "llama-tiny").out
    monkeypatch.setattr("sys.stdin", io.StringIO(printed))
    piped = mxfx("opt", "-", "--passes", "raise-norm,raise-rope", "--timing")
    assert piped.code == 0, piped.err
    at_once = mxfx("opt", "llama-tiny", "--passes", "raise-norm,raise-rope").out
    assert piped.out.partition("//")[0] == at_once


def test_a_budget_stops_the_run_with_exit_code_1(mxfx: Run, pipeline: Path, tmp_path: Path) -> None:
    """No pass failed: a reproducer would run through."""
    pipeline.write_text("[budget]\nmax_kl = 1e-4\n" + pipeline.read_text())
    said = mxfx("run", pipeline, "--out", tmp_path / "out")
    assert "reproducer" not in said.err and not list((tmp_path / "out").rglob("repro.json"))
    assert said.code == 1 and f"pass {ROUNDING} 'round-weights'" in said.err and "max_kl = 0.0001" in said.err


def test_a_folder_that_is_no_run_is_named(mxfx: Run, tmp_path: Path) -> None:
    for command in ("bisect", "weights", "report"):
        said = mxfx(command, tmp_path)
        assert said.code == 2 and "give the folder that `mxfx run --out` wrote" in " ".join(said.err.split())
