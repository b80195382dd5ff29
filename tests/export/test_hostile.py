"""Damaged folders, made by mutation of real ones and given to the command line: each is read, or is one error."""

from __future__ import annotations

import ast
import hashlib
import json
import random
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import mxfx
from mxfx import cli
from mxfx.config.text import from_text
from mxfx.driver import pretrained
from mxfx.driver.pretrained import ModelError, check_fits, load_checked
from mxfx.driver.run_directory import write_report
from mxfx.export.artefact import MANIFEST, PROGRAM, WEIGHTS
from mxfx.export.folder import is_folder
from mxfx.graph.text import to_text
from mxfx.pipeline.case import Case
from tests.commands import PIPELINE
from tests.damage import damaged, damaged_json
from tests.programs import raised

Mutation = Callable[[bytes, random.Random], bytes]


def _sealed(folder: Path) -> None:
    """Make the manifest fit the files again: the damage must be found by what the files say."""
    manifest = json.loads((folder / MANIFEST).read_text())
    for name in (PROGRAM, WEIGHTS):
        manifest["files"][name]["bytes"] = (folder / name).stat().st_size
    digest = hashlib.blake2b((folder / PROGRAM).read_bytes(), digest_size=32).hexdigest()
    manifest["files"][PROGRAM]["blake2b"] = digest
    (folder / MANIFEST).write_text(json.dumps(manifest))


def _damaged_line(data: bytes, draw: random.Random) -> bytes:
    """A printed graph with two lines swapped, one twice or missing, or a number or word of one changed."""
    lines = data.decode().splitlines(keepends=True)
    at, other = draw.randrange(len(lines)), draw.randrange(len(lines))
    kind = draw.randrange(4)
    if kind == 0:
        lines[at], lines[other] = lines[other], lines[at]
    elif kind == 1:
        lines.insert(at, lines[other])
    elif kind == 2:
        del lines[at]
    else:
        words = lines[at].split(" ")
        words[draw.randrange(len(words))] = draw.choice(("99999999999", "-1", "%x", "aten.exp", "f32[2, 3]", "{", "é"))
        lines[at] = " ".join(words)
    return "".join(lines).encode()


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory, finished: Path) -> Path:
    """What a user may have: a model, texts, a pipeline, the directory of a run over them, a reproducer, a graph."""
    root = tmp_path_factory.mktemp("real") / "all"
    shutil.copytree(finished, root)
    (root / "p.toml").write_text(PIPELINE.replace("MODEL", str(root / "hf")))
    shutil.copytree(root / "out" / "p", root / "other")
    program = raised("llama-tiny")
    (root / "graph.mxir").write_text(to_text(program))
    case = Case(program, from_text("rotate-value{block=7}"), 0, None, None, None, None)
    case.save(root / "repro", ValueError("rotate-value: block = 7 does not divide the head dimension 16"))
    return root


_MADE_AGAIN = "out/p/model/emitted-cpu.mxir"
#: File → the command that reads it ({} is the folder), how it is damaged, how often; and whether it is sealed again.
_FILES: dict[str, tuple[tuple[str, ...], tuple[Mutation, ...], int, bool]] = {
    "out/results.json": (("report", "{}/out"), (damaged, damaged_json, damaged_json), 90, False),
    "out/p/weights.json": (("weights", "{}/out"), (damaged, damaged_json), 70, False),
    "out/p/scores.safetensors": (("compare", "{}/out/p", "{}/other"), (damaged,), 50, False),
    "out/p/pipeline.toml": (("config", "show", "{}/out/p/pipeline.toml"), (damaged,), 60, False),
    "out/p/model/manifest.json": (("export", "{}/out", "--to", "hf", "--out", "{}/new"), (damaged, damaged_json), 30,
                                  False),
    "out/p/model/program.mxir": (("export", "{}/out", "--to", "hf", "--out", "{}/new"), (damaged, _damaged_line), 12,
                                 True),
    "out/p/model/weights.safetensors": (("export", "{}/out", "--to", "hf", "--out", "{}/new"), (damaged,), 10, True),
    _MADE_AGAIN: (("generate", "{}/out", "--prompt", "w1 w2", "--max-new-tokens", "1"),
                                     (damaged, _damaged_line), 6, False),
    "out/p/model/config.json": (("generate", "{}/out", "--prompt", "w1 w2", "--max-new-tokens", "1"),
                                (damaged, damaged_json), 6, False),
    "out/p/model/tokenizer.json": (("generate", "{}/out", "--prompt", "w1", "--max-new-tokens", "1"),
                                   (damaged, damaged_json), 10, False),
    "out/p/model/tokenizer_config.json": (("generate", "{}/out", "--prompt", "w1", "--max-new-tokens", "1"),
                                          (damaged, damaged_json), 6, False),
    "graph.mxir": (("opt", "{}/graph.mxir"), (damaged, _damaged_line), 16, False),
    "repro/repro.json": (("repro", "{}/repro"), (damaged, damaged_json), 10, False),
    "repro/weights.safetensors": (("repro", "{}/repro"), (damaged,), 6, False),
    "repro/passes.txt": (("repro", "{}/repro"), (damaged,), 6, False),
    "hf/config.json": (("check", "{}/p.toml"), (damaged, damaged_json), 8, False),
    "hf/model.safetensors": (("run", "{}/p.toml"), (damaged,), 2, False),
}  # fmt: skip


def test_three_hundred_are_damaged() -> None:
    assert sum(count for _, _, count, _ in _FILES.values()) >= 300


@pytest.mark.parametrize("file", _FILES)
def test_a_damaged_file_is_read_or_is_one_error(
    file: str, real: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command, mutations, count, seal = _FILES[file]
    path, whole = real / file, (real / file).read_bytes()
    manifest = (real / "out/p/model/manifest.json").read_bytes()
    draw = random.Random(file)
    monkeypatch.setattr(sys, "argv", ["mxfx", *(part.format(real) for part in command)])
    ended: Counter[int] = Counter()
    try:
        for number in range(count):
            path.write_bytes(mutations[number % len(mutations)](whole, draw))
            if seal:
                _sealed(path.parent)
            before = _listing(real)
            shown = f"{file}, number {number}"
            with pytest.raises(SystemExit) as exit_:
                cli.main()
            said = capsys.readouterr().err
            code = int(exit_.value.code or 0)
            ended[code] += 1
            assert code in (0, 1, 2), f"{shown}: exit code {code}\n{said}"
            assert "Traceback" not in said and "internal error" not in said, f"{shown}\n{said}"
            assert said.count("error:") == (code == 2), f"{shown}: not one error\n{said}"
            if code:
                assert _listing(real) == before, f"{shown}: something half-written is left"
            shutil.rmtree(real / "new", ignore_errors=True)
    finally:
        path.write_bytes(whole)
        (real / "out/p/model/manifest.json").write_bytes(manifest)
    if file == _MADE_AGAIN:
        assert ended == {0: count}, "a model opens without it"
        return
    assert ended[2] >= count // 4, f"{ended}: too few were noticed, the mutations damage nothing"


def _listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_configuration_that_nests_without_end_is_no_folder_of_ours(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[" * 100_000)
    assert not is_folder(tmp_path)


def test_weights_beyond_the_memory_of_the_machine_are_refused_before_any_is_taken(real: Path) -> None:
    with pytest.raises(
        ModelError, match=r"hf' has 4,503,600 GB of weights by its configuration, 4,503,600 GB of which"
    ):
        check_fits(real / "hf", [torch.empty(1 << 50, device="meta")])


@pytest.mark.parametrize("named", ["../evil.safetensors", "/etc/hostname", 7, None])
def test_an_index_that_leaves_its_folder_is_refused_before_it_is_followed(
    named: object, real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(real / "hf", tmp_path / "hf"))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": named}}))
    monkeypatch.setattr(pretrained, "reason_of", lambda error: pytest.fail("transformers was asked"))
    with pytest.raises(ModelError, match="must name files of its own folder"):
        load_checked(folder, "float32")


def test_results_that_name_another_folder_show_nothing_of_it(real: Path, tmp_path: Path) -> None:
    run, secret = Path(shutil.copytree(real / "out", tmp_path / "out")), tmp_path / "secret"
    results = json.loads((run / "results.json").read_text())
    for step in (path.name for path in sorted((run / "p/ir").iterdir()) if path.is_dir()):
        (secret / "ir" / step).mkdir(parents=True)
        (secret / "ir" / step / "diff.txt").write_text("+ what nobody may see")
    for name in ("../secret", str(secret)):
        results["configs"][-1]["name"] = name
        (run / "results.json").write_text(json.dumps(results))
        assert "what nobody may see" not in write_report(run).read_text()


#: Where JSON is read that is no file of a user: a library's own, or text whose reader guards all that it does.
_OTHER_JSON = {
    *("graph/text/parsing.py", "graph/trace.py", "export/gguf.py", "export/model_explorer.py", "ops/mixer.py"),
    "driver/protocol.py",
}


def test_json_files_are_read_in_one_place() -> None:
    package = Path(mxfx.__file__).parent
    readers = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("json.load", "json.loads")
    }
    assert readers - _OTHER_JSON == {"ground/files.py"}
