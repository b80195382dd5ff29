"""What a run refuses, what it warns of, and that what it saved is what it measured."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import mxfx as package
from mxfx.config.emit import EmitConfig
from mxfx.config.pipeline import CalibrationConfig, loads
from mxfx.driver import check, fitting
from mxfx.driver.job import Job
from mxfx.driver.measure import baseline_name
from mxfx.driver.pretrained import ModelError, load_checked, refuse_offloaded
from mxfx.driver.proof import ProofError, check_saved, inexact_told, logits_of
from mxfx.driver.run_directory import RunDirectory, RunError
from mxfx.export.artefact import load, save
from mxfx.graph.program import Program
from mxfx.graph.text import to_text
from mxfx.graph.tiny import tiny
from mxfx.graph.trace import trace
from mxfx.ops.kernels.packed import inexact_rows
from mxfx.pipeline.emit import emitted
from mxfx.rewrite import Context, Local, Lossy, Numerics, Pass, Rewriter
from mxfx.rewrite.pass_ import _REGISTRY, register
from tests.commands import PIPELINE, Run
from tests.local_model import save_model, save_texts
from tests.programs import raised


@dataclass(frozen=True)
class WrongFusion(Pass):
    """Reads twice the input of a quantizer and promises that each region stays as it was."""

    name: ClassVar[str] = "wrong-fusion"
    numerics: ClassVar[Numerics] = Local(1e-2)

    def run(self, rw: Rewriter, ctx: Context) -> None:
        for node in rw.program.nodes("fake_quantize"):
            if rw.match(node):
                double = rw.call(torch.ops.aten.mul.Tensor, node.args[0], 2.0, like=node)
                rw.set_operand(node, 0, double)


@dataclass(frozen=True)
class FailsBesideTheFloatModel(Pass):
    """Asks for calibration tokens, and fails if its reference is the float model that the run began with."""

    name: ClassVar[str] = "fails-beside-the-float-model"
    numerics: ClassVar[Numerics] = Lossy()

    def run(self, rw: Rewriter, ctx: Context) -> None:
        ctx.tokens()
        name = "model.layers.0.mlp.down_proj.weight"
        assert ctx.reference is not None
        if "annotated" not in ctx.reference.facts and not torch.equal(ctx.reference.weights[name], rw.weights[name]):
            raise ArithmeticError("the teacher is the float model")


@pytest.fixture(autouse=True)
def plugged_in() -> Iterator[None]:
    known = dict(_REGISTRY)
    register(WrongFusion)
    register(FailsBesideTheFloatModel)
    yield
    _REGISTRY.clear()
    _REGISTRY.update(known)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_model(tmp_path / "llama")


@pytest.fixture
def pipeline(tmp_path: Path, model: Path) -> Path:
    file = tmp_path / "p.toml"
    file.write_text(PIPELINE.replace("MODEL", str(model)))
    return file


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


# What is known to be wrong before anything slow begins.


@pytest.mark.parametrize("name", ["float", "float x", "results.json", "report.html"])
def test_a_pipeline_cannot_take_the_name_of_something_else_in_the_directory(
    mxfx: Run, pipeline: Path, name: str, tmp_path: Path
) -> None:
    taken = pipeline.rename(tmp_path / f"{name}.toml")
    said = mxfx("run", taken, "--out", tmp_path / "out")
    assert (said.code, "cannot be called" in said.err) == (2, True)


def test_a_pipeline_is_not_called_as_the_single_steps_of_another(mxfx: Run, pipeline: Path, tmp_path: Path) -> None:
    """``mxfx eval --phase decode`` would enter the figures of the one into the row of the other."""
    (tmp_path / "p decode.toml").write_bytes(pipeline.read_bytes())
    said = mxfx("run", tmp_path / "p decode.toml", pipeline)
    assert (said.code, "cannot be called 'p decode' beside 'p'" in said.err) == (2, True), said.err


def test_every_float_model_of_a_run_has_a_row_of_its_own() -> None:
    """Folders of one name: the second model was compared with the first one's float model."""
    taken: list[str] = []
    for model in (
        ("a/llama", "float32", None),
        ("b/llama", "float32", None),
        ("c/llama", "float32", None),
        ("c/llama", "float32", "old"),
        ("c/llama", "float16", None),
    ):
        taken.append(baseline_name(model, taken))
    assert taken == [
        "float",
        "float llama float32",
        "float c/llama float32",
        "float c/llama@old float32",
        "float llama float16",
    ]


def test_two_pipelines_of_one_name_are_refused(mxfx: Run, pipeline: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    twin = tmp_path / "other" / "P.toml"
    twin.write_bytes(pipeline.read_bytes())
    said = mxfx("run", pipeline, twin)
    assert (said.code, "two pipelines are called 'P'" in said.err) == (2, True)


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (("--out", "FILE/below"), "cannot be made a folder"),
        (("--eval", "hellaswag2"), "did you mean 'hellaswag'"),
        (("--eval", "wikitext", "--eval-data", "nowhere.txt"), "nowhere.txt: no such file"),
        (("--eval", "wikitext", "--eval-data", "wikitext2"), "wikitext2: no such file"),
        (("--eval", "nowhere.txt"), "nowhere.txt: no such file"),
        (("--eval", "EMPTY/"), "holds no .txt file"),
        (("--data", "nowhere.jsonl"), "nowhere.jsonl: no such file"),
        (("--device", "mps"), "unknown device 'mps'"),
        (("--set", f"calibration.seed={1 << 64}"), "from 0 to 2^63 - 1"),
        (("--set", "emit.device=mps"), "mps"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[-1],
)
def test_what_is_known_at_once_is_said_before_a_model_is_read(
    mxfx: Run, pipeline: Path, tmp_path: Path, args: tuple[str, ...], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mxfx.driver.check.load_meta_model", lambda *a, **k: pytest.fail("a model was read"))
    (tmp_path / "empty").mkdir()
    given = [one.replace("FILE", str(pipeline)).replace("EMPTY", str(tmp_path / "empty")) for one in args]
    said = mxfx("run", pipeline, *given)
    assert said.code == 2
    assert expected in " ".join(said.err.split())


def test_too_few_tokens_are_said_before_weights_are_read(
    mxfx: Run, pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mxfx.driver.job.load_checked", lambda *a, **k: pytest.fail("weights were read"))
    said = mxfx("run", pipeline, "--data", save_texts(tmp_path / "texts"), "--set", "calibration.length=100")
    assert (said.code, "lower calibration.samples or calibration.length" in said.err) == (2, True)


def test_openings_as_long_as_samples_are_said_before_a_model_is_read(
    mxfx: Run, pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mxfx.driver.check.load_meta_model", lambda *a, **k: pytest.fail("a model was read"))
    calibration = "[calibration]\ndataset = ['wikitext2', 'self']\ncontinued = 0.5\nlength = 32\n"
    pipeline.write_text(calibration + pipeline.read_text())
    said = mxfx("run", pipeline)
    assert (said.code, "leave nothing to write behind openings of 64" in said.err) == (2, True), said.err


def test_how_often_a_short_text_was_read_is_said(mxfx: Run, pipeline: Path, tmp_path: Path) -> None:
    more = ("--set", "calibration.length=100", "--set", "calibration.repeat=true", "--out", tmp_path / "out")
    said = mxfx("run", pipeline, "--data", save_texts(tmp_path / "texts"), *more)
    assert said.code == 0, said.err
    configs = json.loads((tmp_path / "out" / "results.json").read_text())["configs"]
    (note,) = next(config["calibration"] for config in configs if config["name"] == "p")
    assert re.search(r"texts: 32 samples of [\d,]+ tokens, each token seen [\d.]+ times, at other offsets$", note)
    assert note in " ".join((said.out + said.err).split())


def test_a_pass_that_is_sure_to_fail_is_said_before_weights_are_read(
    mxfx: Run, pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mxfx.driver.job.load_checked", lambda *a, **k: pytest.fail("weights were read"))
    gptq = 'name = "gptq"\nselect = "role: q_proj"'
    pipeline.write_text(pipeline.read_text().replace('name = "round-weights"', gptq))
    said = mxfx("run", pipeline, "--data", save_texts(tmp_path / "texts"))
    assert (said.code, "p.toml:15:8: pass 6 'gptq': gptq takes nothing" in said.err) == (2, True), said.err


def test_a_second_run_into_one_directory_is_refused(mxfx: Run, pipeline: Path, tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "out"):
        said = mxfx("run", pipeline, "--out", tmp_path / "out")
    assert (said.code, "another run writes to" in said.err) == (2, True)
    with RunDirectory(tmp_path / "out"), pytest.raises(RunError), RunDirectory(tmp_path / "out"):
        pass


def test_a_run_that_cannot_begin_leaves_the_results_of_the_one_before(
    mxfx: Run, pipeline: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert mxfx("run", pipeline, "--out", out).code == 0
    before = (out / "results.json").read_bytes(), (out / "report.html").read_bytes()
    (tmp_path / "no model").mkdir()
    assert mxfx("run", pipeline, "--model", tmp_path / "no model", "--out", out).code == 2
    assert ((out / "results.json").read_bytes(), (out / "report.html").read_bytes()) == before


def test_what_cannot_be_evaluated_is_refused_before_weights_are_read(
    mxfx: Run, pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mxfx.driver.job.load_checked", lambda *a, **k: pytest.fail("weights were read"))
    (tmp_path / "empty.txt").write_text("")
    for text, problem in (("chat", "no chat template"), (tmp_path / "empty.txt", "holds no text")):
        said = mxfx("run", pipeline, "--eval", text)
        assert said.code == 2 and problem in said.err


def test_scores_of_an_earlier_run_are_not_those_of_this_one(mxfx: Run, pipeline: Path, tmp_path: Path) -> None:
    """``compare`` would set another model's tokens beside it."""
    out, texts = tmp_path / "out", save_texts(tmp_path / "texts")
    assert mxfx("run", pipeline, "--eval", texts, "--out", out).code == 0
    (out / "p" / "samples-quiz.jsonl").write_text("")
    assert mxfx("compare", out / "p", out / "p").code == 0
    assert mxfx("run", pipeline, "--set", "pass.annotate.rule[0].weight=mxint2@32", "--out", out).code == 0
    assert not list((out / "p").glob("samples-*"))
    said = mxfx("compare", out / "p", out / "p")
    assert (said.code, "no scores to compare" in said.err) == (2, True)


def test_a_model_that_several_pipelines_share_is_traced_once(
    mxfx: Run, pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced: list[str] = []

    def counted(model: nn.Module, *, name: str) -> Program:
        traced.append(name)
        return trace(model, name=name)

    monkeypatch.setattr(check, "trace", counted)
    (tmp_path / "again.toml").write_text(pipeline.read_text())
    said = mxfx("run", pipeline, tmp_path / "again.toml", "--out", tmp_path / "out")
    assert said.code == 0, said.err
    assert len(traced) == 1
    # Standard error is no terminal: where a run is, a log tells.
    assert [line for line in said.err.splitlines() if "round-weights" in line] == ["pass 6 of 17: round-weights"] * 2
    first, again = (to_text(load(tmp_path / "out" / name / "model")) for name in ("p", "again"))
    assert again.replace("again.toml", "p.toml") == first


# What a run warns of: in the table, in results.json, in the exit code under --strict.


def test_weights_that_the_checkpoint_lacks_and_an_idle_pass_are_warnings(
    mxfx: Run, model: Path, pipeline: Path, tmp_path: Path
) -> None:
    change_weights(model, lambda weights: weights.pop("model.layers.0.mlp.up_proj.weight"))
    pipeline.write_text(pipeline.read_text() + '\n[[pass]]\nname = "quantize-kv-cache"\n')
    said = mxfx("run", pipeline, "--out", tmp_path / "out", "--strict")
    assert said.code == 1
    assert "lacks 1 weights, which are random now: model.layers.0.mlp.up_proj.weight" in said.err
    assert "p: quantize-kv-cache: did nothing: 0 matched" in said.err
    assert "warnings" in said.out
    configs = json.loads((tmp_path / "out/results.json").read_text())["configs"]
    assert [len(config["warnings"]) for config in configs] == [1, 1]


def test_a_model_that_overflows_is_a_warning_and_its_results_are_json(
    mxfx: Run, model: Path, pipeline: Path, tmp_path: Path
) -> None:
    change_weights(model, lambda weights: weights["model.layers.1.mlp.up_proj.weight"].mul_(1e5))
    texts, out = save_texts(tmp_path / "texts"), tmp_path / "out"
    halved = ("--set", 'model.dtype="float16"', "--eval", "wikitext", "--eval-data", texts)
    said = mxfx("run", pipeline, *halved, "--out", out, "--strict")
    assert said.code == 1, said.err
    assert "logits of the probe are NaN or infinite" in said.err

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    for file in out.rglob("*.json"):
        json.loads(file.read_text(), parse_constant=refuse)


def test_a_checkpoint_of_another_shape_is_one_error(model: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    change_weights(model, lambda weights: weights.update({name: weights[name][:, :-2].contiguous()}))
    with pytest.raises(ModelError, match=r"up_proj.weight' is \(96, 62\) in the checkpoint and \(96, 64\) by the conf"):
        load_checked(model, "float32")


def test_a_head_of_its_own_beside_a_tied_configuration_is_kept(model: Path) -> None:
    change_weights(
        model, lambda weights: weights.update({"lm_head.weight": weights["model.embed_tokens.weight"] * 2.0})
    )
    pipeline = loads(f'pass = []\n[model]\nname = "{model}"\ndtype = "float32"')
    job = Job.load(pipeline, package.check(pipeline).program, "cpu")
    weights = job.program.weights
    assert torch.equal(weights["lm_head.weight"], 2 * weights["model.embed_tokens.weight"])


def test_a_model_on_disk_is_refused() -> None:
    model = tiny("llama-tiny")
    model.hf_device_map = {"model.layers.1": "disk"}  # type: ignore[assignment]
    with pytest.raises(ModelError, match=r"offloaded \(model.layers.1 is not in memory\)"):
        refuse_offloaded(model)
    with pytest.raises(ModelError, match="load it without device_map"):
        package.compile(model, loads("pass = []"))


def test_a_tokenizer_of_another_model_and_too_long_samples_are_refused(tmp_path: Path, model: Path) -> None:
    from mxfx.driver.pretrained import load_tokenizer

    texts = str(save_texts(tmp_path / "texts", documents=6, words=60))
    small = Job.of_model(tiny("llama-tiny", vocab_size=60), torch.device("cpu"))
    small.tokenizer = load_tokenizer(model)
    with pytest.raises(ValueError, match="the model embeds ids below 60"):
        small.tokens(CalibrationConfig(texts, samples=2, length=16))
    short = Job.of_model(tiny("llama-tiny", max_position_embeddings=32), torch.device("cpu"))
    short.tokenizer = small.tokenizer
    with pytest.raises(ValueError, match=r"samples of 40 tokens, the model takes at most 32 "):
        short.tokens(CalibrationConfig(texts, samples=2, length=40))


# What is saved is what was measured.


def test_the_graphs_of_a_run_end_with_the_one_that_is_saved(mxfx: Run, pipeline: Path, tmp_path: Path) -> None:
    assert mxfx("run", pipeline, "--out", tmp_path / "out").code == 0
    folder = tmp_path / "out" / "p"
    last = sorted(path for path in (folder / "ir").glob("*/graph.txt"))[-1]
    assert last.parent.name.split("_")[1] in ("lower", "fold-constants")
    assert last.read_text() == to_text(emitted(load(folder / "model")))
    steps = json.loads((tmp_path / "out/results.json").read_text())["configs"][1]["passes"]
    held = {step["pass"]: step["findings"].get("numerics", {}) for step in steps}
    local = {name: found for name, found in held.items() if found.get("promise") == "local"}
    assert "lower" in local and local["lower"]["regions"] > 10
    assert any(found.get("codes") for found in local.values())
    assert not any(found.get("flipped") for found in local.values())


def test_a_wrong_fusion_is_stopped_with_its_name(mxfx: Run, pipeline: Path) -> None:
    pipeline.write_text(pipeline.read_text() + '\n[[pass]]\nname = "wrong-fusion"\n')
    said = mxfx("run", pipeline)
    assert said.code == 1
    assert "'wrong-fusion'" in said.err and "promises regions equal to 0.01" in said.err


def test_an_artefact_that_computes_something_else_is_found(tmp_path: Path) -> None:
    program = raised("llama-tiny")
    ids = torch.arange(3, 19).view(1, 16)
    logits = logits_of(emitted(program), ids, torch.device("cpu"))
    save(program, tmp_path / "same")
    check_saved(tmp_path / "same", logits, ids, torch.device("cpu"), EmitConfig())
    other = program.copy()
    other.weights.set("model.norm.weight", program.weights["model.norm.weight"] * 1.001, "test")
    save(other, tmp_path / "other")
    with pytest.raises(ProofError, match="is not the one that was measured"):
        check_saved(tmp_path / "other", logits, ids, torch.device("cpu"), EmitConfig())
    (tmp_path / "other" / "weights.safetensors").unlink()
    with pytest.raises(ProofError, match="does not run: ArtefactError"):
        check_saved(tmp_path / "other", logits, ids, torch.device("cpu"), EmitConfig())


def test_what_an_earlier_run_left_does_not_stay(mxfx: Run, pipeline: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert mxfx("run", pipeline, "--out", out).code == 0
    before = {path.name for path in (out / "p" / "ir").iterdir()}
    pipeline.write_text(PIPELINE.replace("MODEL", str(tmp_path / "llama")).split('[[pass]]\nname = "round')[0])
    assert mxfx("run", pipeline, "--out", out).code == 0
    after = {path.name for path in (out / "p" / "ir").iterdir()}
    assert any("round-weights" in name for name in before) and not any("round-weights" in name for name in after)


def test_compile_holds_passes_to_their_promises_unless_told_otherwise() -> None:
    pipeline = loads(PIPELINE.replace("MODEL", "llama") + '\n[[pass]]\nname = "wrong-fusion"\n')
    with pytest.raises(ValueError, match=r"'wrong-fusion'.*promises regions equal"):
        package.compile(tiny("llama-tiny"), pipeline)
    assert isinstance(package.compile(tiny("llama-tiny"), pipeline, instruments=()), nn.Module)


# Tools that run a part of a pipeline again.


def test_bisect_runs_a_pipeline_with_distill(mxfx: Run, pipeline: Path, tmp_path: Path) -> None:
    texts = save_texts(tmp_path / "texts", documents=6, words=60)
    distill = '\n[[pass]]\nname = "distill"\nsteps = 1\n'
    pipeline.write_text(pipeline.read_text().replace('\n[[pass]]\nname = "round-weights"\n', "") + distill)
    shape = ("--set", "calibration.samples=4", "--set", "calibration.length=16")
    said = mxfx("bisect", pipeline, "--data", texts, *shape, "--max-kl", "1e-9")
    assert said.code == 0, said.err
    assert "takes KL" in said.out
    said = mxfx("bisect", pipeline, "--data", texts, *shape, "--max-kl", "50")
    assert (said.code, "KL ends at" in said.err) == (1, True)


def test_a_failure_is_reproduced_beside_the_float_model_and_short_samples(
    mxfx: Run, pipeline: Path, tmp_path: Path
) -> None:
    texts = save_texts(tmp_path / "texts", documents=6, words=60)
    pipeline.write_text(pipeline.read_text() + '\n[[pass]]\nname = "fails-beside-the-float-model"\n')
    shape = ("--set", "calibration.samples=2", "--set", "calibration.length=16")
    said = mxfx("run", pipeline, "--data", texts, *shape, "--out", tmp_path / "out")
    assert said.code == 2
    assert "ArithmeticError: the teacher is the float model" in said.err and "reproducer:" in said.err
    assert "could not record" not in said.err
    again = mxfx("repro", tmp_path / "out/p/repro", "--shrink")
    assert again.code == 0, again.err
    assert "reproduced: PassError" in again.out and "cut to 1 layer" in again.out


def test_a_failure_of_distill_is_reproduced(mxfx: Run, pipeline: Path, tmp_path: Path) -> None:
    """Its folder holds what distill asks for: the float model, calibration tokens, the pass with its options."""
    texts = save_texts(tmp_path / "texts", documents=6, words=60)
    distill = '\n[[pass]]\nname = "distill"\nsteps = 1\nbatch_size = 1\n'
    pipeline.write_text(pipeline.read_text().replace('\n[[pass]]\nname = "round-weights"\n', "") + distill)
    shape = ("--set", "calibration.samples=1", "--set", "calibration.length=16")
    said = mxfx("run", pipeline, "--data", texts, *shape, "--out", tmp_path / "out")
    reason = "distill needs at least two calibration samples, got 1"
    assert said.code == 2 and reason in " ".join(said.err.split())
    folder = tmp_path / "out/p/repro"
    assert f"mxfx repro {folder}" in said.err.replace("\n", "")
    again = mxfx("repro", folder, "--shrink")
    assert again.code == 0, again.err
    assert "reproduced: PassError" in again.out and reason in " ".join(again.out.split())
    assert "cut to 1 layer" in again.out
    # Each failed pass is a PassError: what it was raised from tells one failure from another.
    kept = json.loads((folder / "repro.json").read_text())
    (folder / "repro.json").write_text(json.dumps({**kept, "error": {"type": "PassError from KeyError"}}))
    assert mxfx("repro", folder).code == 1
    # With two samples the same folder runs through.
    (folder / "repro.json").write_text(json.dumps(kept))
    stored = load_file(folder / "weights.safetensors")
    save_file({**stored, "tokens": stored["tokens"].repeat(2, 1)}, folder / "weights.safetensors")
    gone = mxfx("repro", folder)
    assert gone.code == 1 and "not reproduced: ran through" in gone.out


@pytest.mark.parametrize(
    ("command", "file", "expected"),
    [
        ("report", "results.json", "results.json is damaged"),
        ("weights", "weights.json", "weights.json is damaged"),
        ("repro", "repro.json", "is damaged"),
        ("eval", "model/manifest.json", "is not JSON"),
        ("repro", "", "has no repro.json"),
    ],
)
def test_a_damaged_file_is_one_error(mxfx: Run, tmp_path: Path, command: str, file: str, expected: str) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "pipeline.toml").write_text("")
    if file:
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text('{"changes": [')
    said = mxfx(command, folder)
    assert (said.code, expected in " ".join(said.err.split())) == (2, True), said.err


def test_a_directory_of_two_models_is_asked_for_one(mxfx: Run, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "model").mkdir(parents=True)
    said = mxfx("eval", tmp_path)
    assert (said.code, "several emitted models; name one" in said.err) == (2, True)


def test_a_folder_without_a_model_is_no_broken_tokenizer(mxfx: Run, tmp_path: Path) -> None:
    said = mxfx("generate", tmp_path, "--prompt", "x")
    assert (said.code, "has no config.json: no model" in said.err.replace("\n", " ")) == (2, True), said.err


@pytest.mark.parametrize("command", [("generate", "--prompt", "x"), ("serve",), ("eval",)])
def test_a_name_that_a_run_does_not_hold_is_no_hub_id(
    mxfx: Run, tmp_path: Path, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out" / "best").mkdir(parents=True)
    (tmp_path / "out" / "best" / "pipeline.toml").touch()
    monkeypatch.chdir(tmp_path)
    said = mxfx(command[0], "out/bets", *command[1:])
    assert (said.code, "out holds no bets; it holds best" in said.err) == (2, True), said.err


@pytest.mark.parametrize("command", ["check", "bisect", "run", "eval"])
def test_code_of_the_models_repository_is_run_where_it_is_allowed(
    mxfx: Run, pipeline: Path, tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[object] = []

    def look(name: object, *args: object, trust_remote_code: bool = False, **options: object) -> None:
        seen.append(trust_remote_code)
        raise ModelError("stop here")

    monkeypatch.setattr("mxfx.driver.check.load_meta_model", look)
    monkeypatch.setattr("mxfx.driver.again.load_tokenizer", look)
    target = pipeline
    if command == "eval":
        target = tmp_path / "model"
        save(raised("llama-tiny"), target)
    said = mxfx(command, target, "--trust-remote-code")
    assert (said.code, seen) == (2, [True]), said.err


def test_a_model_that_does_not_fit_is_proved_and_evaluated_in_pieces(
    mxfx: Run, pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = save_texts(tmp_path / "texts")
    more = ("--eval", "wikitext", "--eval-data", texts, "--limit-tokens", "200")
    said = mxfx("run", pipeline, "--out", tmp_path / "whole", *more)
    assert said.code == 0, said.err
    monkeypatch.setattr(fitting, "free_bytes", lambda device: 100_000)
    said = mxfx("run", pipeline, "--out", tmp_path / "pieces", *more)
    assert said.code == 0, said.err
    whole, pieces = (
        json.loads((tmp_path / out / "results.json").read_text())["configs"] for out in ("whole", "pieces")
    )
    for one, other in zip(whole, pieces, strict=True):
        assert one["figures"]["token_perplexity"] == other["figures"]["token_perplexity"]
        assert not [w for w in one["warnings"] if "in pieces" in w]
        (warning,) = (w for w in other["warnings"] if "in pieces" in w)
        assert "0.0 GB are free" in warning


def test_rows_that_lost_something_are_warned_of_wherever_a_model_is_measured() -> None:
    warnings: list[str] = []
    with inexact_told(warnings):
        pass
    assert warnings == []
    with inexact_told(warnings):
        inexact_rows(torch.device("cpu")).add_(3)
    assert len(warnings) == 1 and warnings[0].startswith("3 rows of activations span more octaves than E4M3")
