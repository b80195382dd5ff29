"""``mxfx eval``: saved models beside their float model measure what the run measured, and the run's files say so."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mxfx.api import RunOptions, run
from mxfx.calibration.sampling import sample
from mxfx.driver.again import Saved
from mxfx.evaluation.compare import read_scores
from mxfx.evaluation.scoring import FloatLogits
from tests.commands import Run
from tests.evaluation.chatty import byte_model, byte_tokenizer

PIPELINE = r"""
[model]
name = "MODEL"
dtype = "float32"

[[pass]]
name = "annotate"
partial = true
  [[pass.rule]]
  match  = 'model\.layers\.\d+\.mlp\.(gate|up)_proj'
  weight = "mxintBITS@32"
  input  = "mxintBITS@32"

[[pass]]
name = "round-weights"

[[pass]]
name = "insert-fake-quant"
"""
TEXTS = ("--limit-tokens", 300, "--domain-tokens", 200)
EVAL = "wikitext,other.txt,chat"
#: Of the results, what no second measurement has the same.
SECONDS = ("seconds", "eval_seconds")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model, texts and pipelines, what a run of both left in ``out``, and a cache."""
    home = tmp_path_factory.mktemp("again")
    byte_model().save_pretrained(home / "float")
    byte_tokenizer().save_pretrained(home / "float")
    (home / "docs").mkdir()
    for index in range(3):
        (home / "docs" / f"{index}.txt").write_text(f"text {index} goes on and on " * 8)
    (home / "other.txt").write_text("def f(x):\n    return x + 1\n" * 20)
    for name, bits in (("a", 4), ("b", 3)):
        (home / f"{name}.toml").write_text(PIPELINE.replace("MODEL", "./float").replace("BITS", str(bits)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MXFX_CACHE", str(home / "cache"))
        patch.chdir(home)
        limits = {"limit_tokens": 300, "domain_tokens": 200}
        run(["a.toml", "b.toml"], RunOptions(eval=EVAL, eval_data="docs", out=Path("out"), **limits))
    return home


@pytest.fixture
def home(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same for one test, and the place where its commands run."""
    shutil.copytree(made, tmp_path / "home")
    monkeypatch.setenv("MXFX_CACHE", str(tmp_path / "home" / "cache"))
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path / "home"


@pytest.fixture
def ran(home: Path) -> Path:
    """The directory of the run."""
    return home / "out"


def configs(out: Path) -> dict[str, Any]:
    return {config["name"]: config for config in json.loads((out / "results.json").read_text())["configs"]}


def without_seconds(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_seconds(of) for key, of in value.items() if key not in (*SECONDS, "evaluated_again")}
    return [without_seconds(of) for of in value] if isinstance(value, list) else value


def tables(text: str) -> list[list[str]]:
    """The cells of every line of the tables, but for columns of seconds."""
    results, _, domains = text.partition("Domains")
    found = [
        [[cell.strip() for cell in line.split("│")[1:-1]] for line in part.splitlines() if line.startswith("│")]
        for part in (results, domains)
    ]
    return [*(line[:7] for line in found[0]), *found[1]]


def again(mxfx: Run, *args: object) -> Any:
    named = args[args.index("--tasks") + 1] if "--tasks" in args else "wikitext"
    data = ("--eval-data", "docs") if "wikitext" in str(named) else ()
    return mxfx("eval", *TEXTS, *args, *data)


def test_a_saved_model_measures_what_the_run_measured_figure_by_figure(mxfx: Run, ran: Path) -> None:
    before, scores = configs(ran), {name: read_scores(ran / name) for name in ("a", "b")}
    card = (ran / "a" / "model" / "README.md").read_bytes()
    (ran / "a" / "scores.safetensors").unlink()
    said = again(mxfx, "out/a", "out/b", "--tasks", EVAL)
    assert said.code == 0, said.err
    for name in ("a", "b"):
        (now, about), (was, about_then) = read_scores(ran / name), scores[name]
        assert about == about_then and list(about) == ["wikitext", "other", "chat"]
        for domain in about:
            for column in ("targets", "window", "loglikelihood", "top", "kl", "float_top"):
                assert torch.equal(getattr(now[domain], column), getattr(was[domain], column)), (name, domain, column)
    after = configs(ran)
    assert without_seconds(after) == without_seconds(before)
    assert after["a"]["evaluated_again"]["chat"]["device"] == "cpu" and "evaluated_again" not in before["a"]
    assert (ran / "a" / "model" / "README.md").read_bytes() == card
    assert "a, chat: measured again on cpu" in (ran / "report.html").read_text()


def test_the_tables_are_those_of_the_run(mxfx: Run, home: Path) -> None:
    first = mxfx("run", "a.toml", "b.toml", "--eval", EVAL, "--eval-data", "docs", *TEXTS, "--out", "new")
    said = again(mxfx, "new/a", "new/b/model", "--tasks", EVAL)
    assert (first.code, said.code) == (0, 0), said.err
    figures = tables(said.out)
    assert figures == tables(first.out[first.out.index("Perplexity of the emitted models") :])
    assert len(figures) > 9 and any("±" in cell for line in figures for cell in line)


def test_float_logits_and_answers_are_made_once(mxfx: Run, ran: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[str] = []
    kept = FloatLogits._keep

    def keep(self: FloatLogits, path: Path, logits: torch.Tensor) -> None:
        computed.append(path.name)
        kept(self, path, logits)

    drawn: list[int] = []

    def draw(*args: Any, **options: Any) -> Any:
        drawn.append(1)
        return sample(*args, **options)

    monkeypatch.setattr(FloatLogits, "_keep", keep)
    monkeypatch.setattr("mxfx.evaluation.chat.sample", draw)
    assert again(mxfx, "out/a", "out/b", "--tasks", EVAL).code == 0
    assert len(computed) == len(set(computed)) > 3 and not drawn, "answers are cached under the key of the run"
    monkeypatch.setenv("MXFX_CACHE", "fresh")
    assert again(mxfx, "out/b", "--tasks", "chat", "--limit-tokens", 200).code == 0
    assert drawn and list(Path("fresh").glob("chat-*.json"))
    assert len(configs(ran)["b"]["evaluation"]["domains"]) == 3, "and are the same answers"


def test_a_run_that_read_nothing_gets_its_figures_and_can_be_compared(mxfx: Run, home: Path) -> None:
    assert mxfx("run", "a.toml", "b.toml", "--out", "new").code == 0
    assert configs(home / "new")["a"]["evaluation"] is None
    assert again(mxfx, "new/a", "new/b").code == 0
    found = configs(home / "new")
    result, float_result = (found[name]["evaluation"]["domains"]["wikitext"] for name in ("a", "float"))
    assert found["a"]["figures"]["token_ratio"] == result["token_perplexity"] / float_result["token_perplexity"] != 1
    assert found["float"]["figures"]["ratio"] == 1 and result["divergence"]["mean"] > 0
    said = mxfx("compare", "new/a", "new/b")
    assert said.code == 0 and "KL to float" in said.out, said.err
    card = (home / "new" / "b" / "model" / "README.md").read_text()
    assert f"{found['b']['evaluation']['domains']['wikitext']['divergence']['mean']:.4f}" in card
    page = (home / "new" / "report.html").read_text()
    assert "worst" in page and f"{result['divergence']['mean']:.4f}" in page


def test_another_text_of_the_same_name_stands_beside_the_first(mxfx: Run, ran: Path) -> None:
    before = configs(ran)
    said = mxfx("eval", "out/a", "--eval-data", "docs", "--limit-tokens", 100)
    assert said.code == 0 and "the run has read another text as wikitext" in said.err, said.err
    after = configs(ran)
    (new,) = after["a"]["evaluation"]["domains"].keys() - before["a"]["evaluation"]["domains"].keys()
    assert re.fullmatch(r"wikitext \(\d+ tokens, [0-9a-f]{6}\)", new)
    assert new in after["float"]["evaluation"]["domains"] and new not in after["b"]["evaluation"]["domains"]
    for name in ("a", "b", "float"):
        kept = {of: result for of, result in after[name]["evaluation"]["domains"].items() if of != new}
        assert kept == before[name]["evaluation"]["domains"]
        assert without_seconds(after[name]["figures"]) == without_seconds(before[name]["figures"])
    assert mxfx("compare", "out/a", "out/b").code == 0, "on what both have read"
    assert mxfx("eval", "out/b", "--eval-data", "docs", "--limit-tokens", 100).code == 0
    assert mxfx("compare", "out/a", "out/b").out.count("KL to float") == 4


def test_texts_are_compared_under_whichever_name(mxfx: Run, ran: Path) -> None:
    """One run has read more of wikitext, the other that text alone."""
    assert (
        mxfx("run", "b.toml", "--eval", "wikitext", "--eval-data", "docs", "--limit-tokens", 100, "--out", "o2").code
        == 0
    )
    assert mxfx("eval", "out/a", "--eval-data", "docs", "--limit-tokens", 100).code == 0
    said = mxfx("compare", "out/a", "o2/b")
    assert said.code == 0 and said.out.count("KL to float") == 1, said.err
    refused = mxfx("compare", "out/b", "o2/b")
    assert refused.code == 2 and "different text" in refused.err


def gone(home: Path) -> None:
    shutil.move(home / "float", home / "elsewhere")


def changed(home: Path) -> None:
    file = home / "float" / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.1.mlp.up_proj.weight"] += 1e-3
    save_file(weights, file, {"format": "pt"})


def respelled(home: Path) -> None:
    file = home / "float" / "tokenizer.json"
    said = json.loads(file.read_text())
    vocabulary = said["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(said))


def test_without_its_float_model_perplexity_alone_is_measured_and_said_so(mxfx: Run, ran: Path, home: Path) -> None:
    gone(home)
    before = (ran / "results.json").read_bytes()
    said = again(mxfx, "out/a")
    assert said.code == 0
    told = " ".join(said.err.split())
    assert "warning: a: its float model './float' is not there" in told and "give it with --float MODEL" in told
    assert "a: nothing is written" in told and (ran / "results.json").read_bytes() == before
    assert [line[0] for line in tables(said.out)] == ["a", "wikitext: 300", "a"]
    refused = again(mxfx, "out/a", "--tasks", "chat")
    assert refused.code == 2 and "--float MODEL" in refused.err
    given = again(mxfx, "out/a", "--float", "./elsewhere", "--tasks", EVAL)
    assert given.code == 0 and "warning" not in given.err and "written to" in given.err, given.err
    missing = again(mxfx, "out/a", "--float", "./nowhere")
    assert missing.code == 2 and "nowhere" in missing.err


@pytest.mark.parametrize(
    ("change", "problem"),
    [(changed, "model.layers.1.mlp.up_proj.weight differs"), (respelled, "different tokenizers")],
)
def test_another_float_model_than_its_own_is_refused(
    mxfx: Run, ran: Path, home: Path, change: Callable[[Path], None], problem: str
) -> None:
    change(home)
    said = again(mxfx, "out/a")
    assert said.code == 2 and problem in said.err and "--float none" in said.err
    assert again(mxfx, "out/a", "--float", "none").code == 0


def test_another_float_model_that_is_asked_for_is_a_warning_and_writes_nothing(
    mxfx: Run, ran: Path, home: Path
) -> None:
    changed(home)
    before = (ran / "results.json").read_bytes()
    said = again(mxfx, "out/a", "--float", "float")
    assert said.code == 0 and "is not the float model that" in said.err and "nothing is written" in said.err
    assert "±" in said.out and (ran / "results.json").read_bytes() == before


def test_without_writing_the_run_stays_as_it_is(mxfx: Run, ran: Path) -> None:
    before = {file: file.read_bytes() for file in ran.rglob("*") if file.is_file()}
    assert again(mxfx, "out/a", "--no-write").code == 0
    assert {file: file.read_bytes() for file in before} == before


def test_a_folder_of_no_run_has_no_float_model_unless_it_is_named(mxfx: Run, ran: Path, home: Path) -> None:
    shutil.copytree(ran / "a" / "model", home / "alone")
    said = again(mxfx, "alone")
    assert said.code == 0 and "its float model is not known" in said.err
    said = again(mxfx, "alone", "--float", "float", "--tasks", EVAL)
    assert said.code == 0 and "scores are in alone" in said.err, said.err
    same = mxfx("compare", "alone", "out/a", "--floor", 0)
    assert same.code == 0 and same.out.count("inside the noise") == 12, same.out
    assert mxfx("eval", "alone", "--float", "none", "--eval-data", "docs").code == 0, "it opens with scores in it"


def test_decode_is_measured_beside_the_float_model_and_has_a_row_of_its_own(mxfx: Run, ran: Path) -> None:
    before = configs(ran)
    said = again(mxfx, "out/a", "--phase", "decode", "--tasks", "other.txt", "--limit-tokens", 200)
    assert said.code == 0, said.err
    after = configs(ran)
    assert list(after) == ["float", "a", "a decode", "b"] and after["a"] == before["a"]
    steps, whole = (after[name]["evaluation"]["domains"]["other"] for name in ("a decode", "a"))
    assert steps["divergence"]["mean"] == pytest.approx(whole["divergence"]["mean"], rel=1e-3)
    assert read_scores(ran / "a" / "decode")[0]["other"].kl is not None
    assert "one token a step" in (ran / "report.html").read_text()


def test_rows_that_were_rounded_inexactly_are_told(mxfx: Run, ran: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = iter(range(0, 700, 7))
    monkeypatch.setattr("mxfx.driver.proof.inexact_count", lambda: next(counts))
    said = again(mxfx, "out/a", "--tasks", "other.txt", "--limit-tokens", 200)
    assert "warning: a: 7 rows of activations span more octaves" in " ".join(said.err.split())
    assert any(warning.startswith("7 rows") for warning in configs(ran)["a"]["warnings"])
    assert configs(ran)["a"]["figures"]["warnings"] == len(configs(ran)["a"]["warnings"])


def test_a_folder_that_is_called_as_the_float_model_s_row_has_another(ran: Path, home: Path) -> None:
    shutil.copytree(ran / "a" / "model", home / "emitted" / "float")
    assert Saved.at("emitted/float").name == "emitted/float"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home / "emitted")
        assert Saved.at("float").name == str(home / "emitted" / "float")


def test_damaged_results_are_refused_before_anything_is_measured(
    mxfx: Run, ran: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mxfx.driver.job.load_checked", lambda *a, **k: pytest.fail("weights were read"))
    for text, problem in (("{", "is not JSON"), ('{"configs": 3}', "is damaged")):
        (ran / "results.json").write_text(text)
        said = again(mxfx, "out/a")
        assert said.code == 2 and problem in said.err and "--no-write" in said.err


def test_one_model_named_twice_is_refused(mxfx: Run, ran: Path) -> None:
    said = again(mxfx, "out/a", "out/a/model")
    assert said.code == 2 and "named twice" in said.err
