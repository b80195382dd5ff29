"""The command line on a tiny local model: what it prints, what it writes, and one clear error for each mistake."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import tomli

from tests.commands import Run, Said
from tests.local_model import save_model, save_texts

CONFIGS = Path(__file__).parents[1] / "passes_configs"
CONFIG_A = CONFIGS / "tutorial_a_rtn.toml"
PIPELINE = r"""
[model]
name = "MODEL"
dtype = "float32"

[[pass]]
name = "annotate"
  [[pass.rule]]
  match  = 'model\.layers\.\d+\.mlp\.(gate|up|down)_proj'
  weight = "mxint4@32"
  expect = "3 * layers"

[[pass]]
name = "round-weights"
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def pipeline(tmp_path: Path, model: Path) -> Path:
    file = tmp_path / "p.toml"
    file.write_text(PIPELINE.replace("MODEL", str(model)))
    return file


def test_the_version_is_that_of_the_package(mxfx: Run) -> None:
    with (Path(__file__).parents[1] / "pyproject.toml").open("rb") as file:
        version = tomli.load(file)["project"]["version"]
    assert mxfx("--version") == Said(0, f"mxfx {version}\n", "")


def test_run_prints_one_table_for_all_files_and_writes_the_results(
    mxfx: Run, model: Path, pipeline: Path, tmp_path: Path
) -> None:
    texts, out = save_texts(tmp_path / "texts"), tmp_path / "out"
    same = ("--model", model, "--set", 'model.dtype="float32"')
    said = mxfx("run", CONFIG_A, pipeline, *same, "--eval", "wikitext", "--eval-data", texts, "--out", out)
    assert said.code == 0, said.err
    passes, _, table = said.out.partition("Perplexity of the emitted models")
    assert "KL and SQNR of the logits against the float model, on the run's probe tokens" in " ".join(passes.split())
    assert [name for name in ("float", "tutorial_a_rtn", "p") if f" {name} " not in table] == []
    results = json.loads((out / "results.json").read_text())
    rows = {config["name"]: config["figures"] for config in results["configs"]}
    assert list(rows) == ["float", "tutorial_a_rtn", "p"]
    assert rows["float"]["ratio"] == 1
    spent = results["time"]
    parts = {"check and trace", "load and prove", "annotate", "instruments", "save and prove", "evaluation of wikitext"}
    assert parts <= set(spent) and all(spent[name]["processor_seconds"] > 0 for name in parts)
    assert rows["tutorial_a_rtn"]["bits_per_weight"] < rows["p"]["bits_per_weight"] < 32
    assert all(row["word_perplexity"] > 1 for row in rows.values())
    matched = {step["pass"]: step["matched"] for step in results["configs"][2]["passes"]}
    asked = {"raise-norm": 5, "raise-rope": 4, "raise-attention": 2, "annotate": 6, "round-weights": 6}
    assert {name: matched[name] for name in asked} == asked
    assert matched["lower"] > 10


def test_the_card_of_a_saved_model_has_the_figures_of_its_run(mxfx: Run, pipeline: Path, tmp_path: Path) -> None:
    save_texts(tmp_path / "b|c")
    save_texts(tmp_path / "more", documents=2)
    texts = [str(tmp_path / name) for name in ("b|c", "more")]
    said = mxfx("run", pipeline, "--eval", ",".join(texts), "--out", tmp_path / "out")
    assert said.code == 0, said.err
    found = json.loads((tmp_path / "out" / "results.json").read_text())["configs"]
    domains, float_domains = (config["evaluation"]["domains"] for config in reversed(found))
    card = (tmp_path / "out" / "p" / "model" / "README.md").read_text(encoding="utf-8")
    bits = f"{found[1]['figures']['bits_per_weight']:.2f}"
    assert f"{bits} bits a weight" in card and card.count(f"| {bits} |") == len(domains) == 2
    for name, domain in domains.items():
        (line,) = [line for line in card.splitlines() if line.startswith("| " + name.replace("|", "\\|"))]
        ratio = domain["token_perplexity"] / float_domains[name]["token_perplexity"]
        kl, agreement = domain["divergence"]["mean"], domain["divergence"]["agreement"]
        for figure in (f"{domain['tokens']:,} |", f"| {ratio:.4f} ±", f"| {kl:.4f} ±", f"| {agreement:.4f} ±"):
            assert figure in line
    assert not list((tmp_path / "out" / "p" / "model").glob("*.part"))


def test_the_card_of_a_model_that_was_not_evaluated_has_no_table(mxfx: Run, pipeline: Path, tmp_path: Path) -> None:
    assert mxfx("run", pipeline, "--out", tmp_path / "out").code == 0
    card = (tmp_path / "out" / "p" / "model" / "README.md").read_text(encoding="utf-8")
    assert "bits a weight" in card and "| " not in card


def test_a_run_is_evaluated_again_from_its_files_alone(
    mxfx: Run, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shutil.copytree(finished, tmp_path / "again"))
    figures = json.loads(Path("out/results.json").read_text())["configs"][1]["figures"]
    said = mxfx("eval", "out", "--eval-data", "texts")
    assert said.code == 0, said.err
    assert f"{figures['word_perplexity']:.4f}" in said.out


def test_another_model_is_no_float_model_of_what_is_evaluated(
    mxfx: Run, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shutil.copytree(finished, tmp_path / "again"))
    save_model(Path("other"), "qwen3-tiny")
    said = mxfx("eval", "out", "--eval-data", "texts", "--float", "./other")
    assert said.code == 2 and "expected the float model that it was made of" in said.err


def test_check_needs_no_weights(mxfx: Run, pipeline: Path, model: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((model / "config.json").read_bytes())
    said = mxfx("check", pipeline, "--model", bare)
    assert said.code == 0, said.err
    assert "in order: raise-norm, raise-rope, raise-attention, split-fused, annotate, round-weights" in said.out
    assert "lower, fold-constants" in " ".join(said.out.split())
    assert said.err.splitlines() == [f"tracing {bare}"]
    assert "LlamaForCausalLM" in said.out and "2 layers" in said.out
    assert "15 linear, 2 attention, 5 rms_norm, 4 rope, 1 embedding" in said.out
    assert said.out.endswith("ok\n")


@pytest.mark.parametrize(("device", "way"), [("cpu", "in a step codes meet codes"), ("cuda", "FP8 tensor cores")])
def test_check_says_how_each_linear_will_run_on_a_device_that_need_not_be_here(
    mxfx: Run, pipeline: Path, device: str, way: str
) -> None:
    from mxfx.ops.kernels.library import load_cpu

    if load_cpu() is not None and device == "cpu":
        way = "a GEMM in float32, the weight decoded before"
    pipeline.write_text(pipeline.read_text().replace("  expect", '  input  = "mxint4@32"\n  expect'))
    said = mxfx("check", pipeline, "--device", device)
    assert said.code == 0, said.err
    told = " ".join(said.out.split())
    assert way in told and "lm_head, float32: a GEMM in float32 (its weight has no format)" in told


@pytest.mark.parametrize("name", ["tutorial_a_rtn", "tutorial_b_gptq", "tutorial_c_rotation_search"])
def test_config_show_prints_the_pipeline_of_a_tutorial_file(mxfx: Run, name: str, tmp_path: Path) -> None:
    said = mxfx("config", "show", CONFIGS / f"{name}.toml")
    assert said.code == 0, said.err
    shown = tmp_path / "shown.toml"
    shown.write_text(said.out)
    assert mxfx("config", "show", shown).out == said.out
    assert said.out.index('"raise-norm"') < said.out.index('"annotate"')


def test_config_show_takes_a_file_that_only_collects(mxfx: Run, tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("[token_collector]\ntarget_nsamples = 4\nseqlen = 16\nsave_path = 'c.pt'\n")
    said = mxfx("config", "show", file)
    assert said.code == 0 and f"mxfx collect SOURCE --model M --config {file}" in said.out and tomli.loads(said.out)
    file.write_text(file.read_text().replace("seqlen", "seqln"))
    assert (said := mxfx("config", "show", file)).code == 2 and "seqlen" in said.err


def test_config_show_applies_overrides(mxfx: Run, pipeline: Path) -> None:
    said = mxfx("config", "show", pipeline, "--set", "calibration.samples=8")
    assert tomli.loads(said.out)["calibration"]["samples"] == 8


def test_config_show_ends_with_the_emit_stage_of_the_device(mxfx: Run, pipeline: Path) -> None:
    names = {
        device: re.findall(r'name += "([a-z-]+)"', mxfx("config", "show", pipeline, "--device", device).out)
        for device in ("cpu", "cuda")
    }
    given = ["raise-norm", "raise-rope", "raise-attention", "split-fused", "annotate", "round-weights"]
    fusions = ["fuse-hadamard-quant", "fuse-norm-quant", "fuse-activation-quant", "fuse-rope-quant"]
    assert names["cpu"][:6] == names["cuda"][:6] == given
    assert names["cpu"][-2:] == ["lower", "fold-constants"]
    assert names["cuda"][-4:] == ["fuse-quant-linear", "fuse-residual-norm", "fuse-heads", "fold-constants"]
    assert all([name for name in stage if name in fusions] == fusions for stage in names.values())


def test_the_emit_table_decides_the_stage_and_its_passes_take_options(mxfx: Run, pipeline: Path) -> None:
    said = mxfx("config", "show", pipeline, "--set", "pass.fold-constants.max_growth=7", "--set", 'emit.device="cuda"')
    assert '[emit]\ndevice = "cuda"' in said.out
    assert '"fuse-norm-quant"' in said.out and "max_growth = 7" in said.out


def test_config_schema_is_json(mxfx: Run) -> None:
    assert "properties" in json.loads(mxfx("config", "schema").out)


def test_passes_lists_all_and_describes_one(mxfx: Run) -> None:
    said = mxfx("passes")
    assert [n for n in ("raise-norm", "annotate", "round-weights", "lower") if n not in said.out] == []
    one = mxfx("passes", "round-weights")
    assert one.code == 0
    assert "annotated" in one.out and "weights-rounded" in one.out and "input axis" in one.out


@pytest.mark.parametrize("command", ["check", "run"])
@pytest.mark.parametrize(
    ("old", "new", "place", "said"),
    [
        ("match ", "mach ", "9:3", ["unknown key 'mach'", "did you mean 'match'?"]),
        ("mxint4@32", "mxint4@", "10:12", ["unknown format 'mxint4@'", "did you mean 'mxint4@32'?"]),
        (r"\d+\.mlp", r"(\d+", "9:12", ["is no regular expression", "missing )"]),
        ("round-weights", "round-weihgts", "14:8", ["unknown pass", "did you mean 'round-weights'?"]),
        ("/llama", "/lama", "3:8", ["no folder", "did you mean 'llama'?"]),
        ("gate|up|down)_proj", "gate|up|down)_porj", "9:12", ["fits 0 nodes", "'3 * layers' asks for 6"]),
        ('  expect = "3 * layers"\n', '  expect = "4 * layers"\n', "9:12", ["fits 6 nodes", "asks for 8"]),
    ],
    ids=["key", "format", "regex", "pass", "model", "nothing", "count"],
)  # fmt: skip
def test_a_mistake_is_one_error_with_its_place(
    mxfx: Run, pipeline: Path, command: str, old: str, new: str, place: str, said: list[str]
) -> None:
    text = pipeline.read_text()
    assert old in text
    pipeline.write_text(text.replace(old, new))
    answer = mxfx(command, pipeline)
    assert answer.code == 2
    assert f"error: {pipeline}:{place}: " in answer.err
    assert [part for part in said if part not in answer.err] == []
    assert "Traceback" not in answer.err


def test_a_file_that_does_not_exist_is_named(mxfx: Run, tmp_path: Path) -> None:
    answer = mxfx("run", tmp_path / "nope.toml")
    assert answer.code == 2 and "nope.toml" in answer.err and "Traceback" not in answer.err


def test_an_unknown_pass_is_named_with_its_neighbour(mxfx: Run) -> None:
    answer = mxfx("passes", "gptqq")
    assert answer.code == 2 and "did you mean 'gptq'?" in answer.err


def test_an_unknown_device_is_refused_before_anything_is_read(mxfx: Run, tmp_path: Path) -> None:
    answer = mxfx("run", tmp_path / "nope.toml", "--device", "gpu")
    assert answer.code == 2 and "unknown device 'gpu'" in answer.err and "cuda" in answer.err


def test_without_a_command_the_help_is_shown(mxfx: Run) -> None:
    answer = mxfx("--help")
    assert answer.code == 0
    assert [c for c in ("run", "check", "config", "passes", "eval") if c not in answer.out] == []


def test_doctor_says_what_its_own_cache_takes(mxfx: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "self-1.safetensors").write_bytes(bytes(20_000_000))
    monkeypatch.setenv("MXFX_CACHE", str(tmp_path))
    said = mxfx("doctor")
    assert said.code == 0 and f"cache {tmp_path}: 0.02 GB" in said.out
