"""What the emit stage made of a folder is read by who opens it, beside it or in the cache, and is never another's."""

from __future__ import annotations

import json
import shutil
import stat
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import mxfx  # noqa: F401  (registers emitted models)
from mxfx.config import loads
from mxfx.export import artefact, kept
from mxfx.export.artefact import MANIFEST, PROGRAM, WEIGHTS, ArtefactError
from mxfx.export.folder import MxfxForCausalLM, save_folder
from mxfx.graph.tiny import tiny
from mxfx.graph.trace import trace
from mxfx.ground import files
from mxfx.pipeline.manager import PassManager

_PIPELINE = """
[[pass]]
name = "annotate"
unmatched = "warn"
  [[pass.rule]]
  role   = "attention, mlp"
  weight = "mxint4@32"
  input  = "mxint4@32"
  [[pass.rule]]
  role   = "attention"
  kv     = "mxint4@16"
[[pass]]
name = "round-weights"
[[pass]]
name = "insert-fake-quant"
[[pass]]
name = "quantize-kv-cache"
"""
_EIGHT_BITS = """  [[pass.rule]]
  role   = "embed, head"
  weight = "mxint8@32"
[[pass]]
name = "round-weights"
"""
_ROUND = '[[pass]]\nname = "insert-fake-quant"'
_ROTATE = '[[pass]]\nname = "online-rotation"\n'
_IDS = torch.arange(3, 25).view(2, 11)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MXFX_CACHE", str(tmp_path / "cache"))
    # Folders that are saved once for all tests are read under the caches of all.
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "key").write_bytes(bytes(32))
    files._said.clear()
    return tmp_path / "cache" / "emitted"


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder as it is saved."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family) / "model"
            name, _, how = family.partition(" ")
            text = _PIPELINE.replace(_ROUND, _ROTATE + _ROUND) if how == "rotated" else _PIPELINE
            if how == "8 bits":
                text = text.replace('[[pass]]\nname = "round-weights"\n', _EIGHT_BITS)
            pipeline = loads(text).completed().emitted("cpu")
            model = tiny(name).bfloat16() if how == "8 bits" else tiny(name)
            save_folder(PassManager().run(trace(model), pipeline).portable, made[family])
        return made[family]

    return folder


@pytest.fixture(scope="module")
def saved(shipped: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder that holds the program alone, so that what is made of it is kept in the cache."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family) / "model"
            shutil.copytree(shipped(family), made[family], ignore=shutil.ignore_patterns("emitted-*"))
        return made[family]

    return folder


@pytest.fixture
def folder(saved: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved("llama-tiny"), tmp_path / "model"))


def _logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(_IDS).logits


def _no_emission(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object) -> None:
        raise AssertionError("the emit stage ran again")

    monkeypatch.setattr(kept, "emitted", never)


def _assert_same(model: nn.Module, other: nn.Module) -> None:
    """One graph, the same weights, the same bits."""
    assert torch.equal(_logits(model), _logits(other))
    assert model.graph.code == other.graph.code and model.specs == other.specs
    mine, theirs = model.graph.state_dict(), other.graph.state_dict()
    assert list(mine) == list(theirs) and all(torch.equal(mine[n], theirs[n]) for n in mine)
    assert all(mine[n].dtype == theirs[n].dtype for n in mine)


@pytest.mark.parametrize("family", ["llama-tiny", "gemma3-tiny", "phi3-tiny", "llama-tiny rotated"])
def test_the_second_opening_runs_no_pass_and_gives_the_same_bits(
    family: str, saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = MxfxForCausalLM.from_pretrained(saved(family))
    _no_emission(monkeypatch)
    second = MxfxForCausalLM.from_pretrained(saved(family))
    _assert_same(second, first)
    assert torch.equal(second.generate(_IDS, max_new_tokens=4), first.generate(_IDS, max_new_tokens=4))
    monkeypatch.undo()
    second.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / PROGRAM).read_bytes() == (saved(family) / PROGRAM).read_bytes()


def test_a_weight_that_the_stage_made_is_kept_too(saved: Callable[[str], Path], cache: Path) -> None:
    MxfxForCausalLM.from_pretrained(saved("llama-tiny rotated"))
    (beside,) = cache.glob("*.safetensors")
    assert "hadamard.64" in load_file(beside)
    beside.unlink()
    MxfxForCausalLM.from_pretrained(saved("llama-tiny rotated"))
    assert beside.is_file(), "without it all is made again"


def test_a_model_that_was_moved_is_the_same(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    MxfxForCausalLM.from_pretrained(folder)
    _no_emission(monkeypatch)
    MxfxForCausalLM.from_pretrained(Path(shutil.move(folder, tmp_path / "elsewhere")))


def test_a_changed_graph_is_an_error_and_with_its_manifest_another_program(folder: Path, cache: Path) -> None:
    before = _logits(MxfxForCausalLM.from_pretrained(folder))
    text = (folder / PROGRAM).read_text()
    changed = text.replace("1e-05", "1e-01") if "1e-05" in text else text.replace("1e-06", "1e-01")
    assert changed != text
    (folder / PROGRAM).write_text(changed)
    with pytest.raises(ArtefactError, match="was changed"):
        MxfxForCausalLM.from_pretrained(folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    facts = {"bytes": len(changed.encode()), "blake2b": artefact._hash(changed.encode())}
    manifest["files"][PROGRAM] = facts
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert not torch.equal(_logits(MxfxForCausalLM.from_pretrained(folder)), before)
    assert len(list(cache.glob("*.mxir"))) == 2


def test_a_changed_weight_is_an_error(folder: Path) -> None:
    MxfxForCausalLM.from_pretrained(folder)
    weights = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
    codes = next(name for name in weights if name.endswith(".codes"))
    weights[codes].view(-1)[0] ^= 1
    size = (folder / WEIGHTS).stat().st_size
    save_file(weights, folder / WEIGHTS)
    assert (folder / WEIGHTS).stat().st_size == size, "the manifest alone does not tell"
    with pytest.raises(ArtefactError, match=codes):
        MxfxForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("damage", ["cut", "word", "another op", "empty", "no text"])
def test_what_is_damaged_is_made_again(damage: str, folder: Path, cache: Path) -> None:
    model = MxfxForCausalLM.from_pretrained(folder)
    (path,) = cache.glob("*.mxir")
    whole = path.read_bytes()
    text = whole.decode().partition("\n")[2].replace("aten.embedding", "aten.from_file")
    path.write_bytes({
        "cut": whole[: len(whole) // 2],
        "word": whole.replace(b"mxint4", b"mxint8", 1),
        "another op": f"{kept._sealed(text)}\n{text}".encode(),
        "empty": b"",
        "no text": bytes(range(256)),
    }[damage])  # fmt: skip
    assert torch.equal(_logits(MxfxForCausalLM.from_pretrained(folder)), _logits(model))
    assert path.read_bytes() == whole


@pytest.mark.parametrize("other", ["source_digest", "offered"])
def test_other_code_and_other_kernels_emit_anew(
    other: str, folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    MxfxForCausalLM.from_pretrained(folder)
    monkeypatch.setattr(kept, other, lambda *args: "another")
    MxfxForCausalLM.from_pretrained(folder)
    assert len(list(cache.glob("*.mxir"))) == 2


def test_a_cache_that_cannot_be_written_to_is_said_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MXFX_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="MXFX_CACHE"):
        first = MxfxForCausalLM.from_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(_logits(MxfxForCausalLM.from_pretrained(folder)), _logits(first))


def test_only_so_much_is_kept(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    MxfxForCausalLM.from_pretrained(folder)
    monkeypatch.setattr(kept, "_ROOM", 5 * next(cache.glob("*.mxir")).stat().st_size // 2)
    for number in range(4):
        monkeypatch.setattr(kept, "source_digest", lambda number=number: f"code {number}")
        MxfxForCausalLM.from_pretrained(folder)
    assert len(list(cache.glob("*.mxir"))) == 2


@pytest.mark.parametrize(
    "family", ["llama-tiny", "gemma3-tiny", "phi3-tiny", "llama-tiny rotated", "llama-tiny 8 bits"]
)
def test_the_first_opening_runs_no_pass_and_gives_the_bits_of_the_stage(
    family: str,
    shipped: Callable[[str], Path],
    saved: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    cache: Path,
) -> None:
    emitted = MxfxForCausalLM.from_pretrained(saved(family))
    _no_emission(monkeypatch)
    shipped(family)
    shutil.rmtree(cache)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, second = (MxfxForCausalLM.from_pretrained(shipped(family)) for _ in range(2))
    for model in (first, second):
        _assert_same(model, emitted)
    assert torch.equal(first.generate(_IDS, max_new_tokens=4), emitted.generate(_IDS, max_new_tokens=4))


def test_generate_opens_it_so_too(shipped: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from mxfx.driver import generate

    _no_emission(monkeypatch)
    monkeypatch.setattr(generate, "load_tokenizer", lambda *args, **options: None)
    model, _ = generate.open_model(shipped("llama-tiny"))
    assert _logits(model).isfinite().all()


def test_no_pass_is_imported(shipped: Callable[[str], Path]) -> None:
    code = f"""
import sys, mxfx, transformers
transformers.AutoModelForCausalLM.from_pretrained({str(shipped("llama-tiny"))!r})
print(*(name for name in sys.modules if name.startswith(("mxfx.passes", "mxfx.rewrite", "mxfx.pipeline.manager"))))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_no_weight_is_twice_in_a_folder(shipped: Callable[[str], Path], cache: Path, tmp_path: Path) -> None:
    """What runs as floats is decoded when it is opened, from the codes; the cache holds no floats either."""
    folder = shipped("llama-tiny 8 bits")
    facts = json.loads((folder / "emitted-cpu.mxir").read_text().splitlines()[1].removeprefix("// "))
    assert facts["decoded"]
    state = MxfxForCausalLM.from_pretrained(folder).graph.state_dict()
    assert all(state[name].dtype == torch.bfloat16 for name in facts["decoded"])
    assert not list(folder.glob("emitted-*.safetensors")) and not list(cache.glob("*.safetensors"))


def test_a_weight_of_the_stage_that_is_large_is_in_no_folder(
    shipped: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = MxfxForCausalLM.from_pretrained(shipped("llama-tiny rotated"))
    model.save_pretrained(tmp_path / "small")
    assert "hadamard.64" in load_file(tmp_path / "small" / "emitted-cpu.safetensors")
    monkeypatch.setattr(kept, "_SMALL", 1000)
    model.save_pretrained(tmp_path / "small")
    assert not list((tmp_path / "small").glob("emitted-*"))
    assert torch.equal(_logits(MxfxForCausalLM.from_pretrained(tmp_path / "small")), _logits(model))


def _forged(text: str, old: str, new: str) -> bytes:
    """Changed, under a hash that fits."""
    rest = text.partition("\n")[2].replace(old, new)
    return f"{kept._sealed(rest)}\n{rest}".encode()


@pytest.mark.parametrize("damage", ["cut", "word", "another op", "empty", "no text", "no facts", "decoded"])
def test_what_is_damaged_in_a_folder_is_said_and_not_used(
    damage: str, shipped: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(shipped("llama-tiny 8 bits"), tmp_path / "model"))
    expected = _logits(MxfxForCausalLM.from_pretrained(folder))
    path = folder / "emitted-cpu.mxir"
    whole = path.read_bytes()
    path.write_bytes({
        "cut": whole[: len(whole) // 2],
        "word": whole.replace(b"1e-05", b"1e-01").replace(b"1e-06", b"1e-01"),
        "another op": _forged(whole.decode(), "mxfx_kernels.fake_quantize", "aten.from_file"),
        "empty": b"",
        "no text": bytes(range(256)),
        "no facts": _forged(whole.decode(), "// {", "// ["),
        "decoded": _forged(whole.decode(), '"width": ', '"width": -'),
    }[damage])  # fmt: skip
    assert path.read_bytes() != whole
    said = (
        "it is damaged"
        if damage in ("another op", "no facts", "decoded", "no text")
        else "this user did not write it so"
    )
    with pytest.warns(UserWarning, match=f"emitted-cpu.mxir is not used, {said}"):
        assert torch.equal(_logits(MxfxForCausalLM.from_pretrained(folder)), expected)


def test_what_somebody_else_wrote_is_not_used(shipped: Callable[[str], Path], tmp_path: Path, cache: Path) -> None:
    """Its kernels would be called unproven: nobody vouches for sizes and addresses."""
    folder = Path(shutil.copytree(shipped("llama-tiny"), tmp_path / "model"))
    expected = _logits(MxfxForCausalLM.from_pretrained(folder))
    key = cache.parent / "key"
    key.unlink()
    with pytest.warns(UserWarning, match=r"emitted-cpu.mxir is not used, .*came from elsewhere"):
        assert torch.equal(_logits(MxfxForCausalLM.from_pretrained(folder)), expected)
    assert len(key.read_bytes()) == 32 and stat.S_IMODE(key.stat().st_mode) == 0o600
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MxfxForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("folder", "it was made of another program"),
        ("mxfx", "it was made by another mxfx"),
        ("torch", r"it was made with another torch \(2.0.0, here \d"),
        ("kernels", "it was made for other kernels"),
        ("plugins", "it was made with other plugins"),
        ("device", "it was made for another device"),
    ],
)
def test_what_was_made_of_or_for_anything_else_is_said_and_not_used(
    key: str, said: str, shipped: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(shipped("llama-tiny"), tmp_path / "model"))
    expected = _logits(MxfxForCausalLM.from_pretrained(folder))
    path = folder / "emitted-cpu.mxir"
    facts = json.loads(path.read_text().splitlines()[1].removeprefix("// "))
    # A program that gives other logits: that it is not used shows.
    other = {**facts, key: "2.0.0"}
    text = path.read_text().replace("1e-05", "1e-01").replace("1e-06", "1e-01")
    path.write_bytes(_forged(text, json.dumps(facts), json.dumps(other)))
    with pytest.warns(UserWarning, match=f"emitted-cpu.mxir is not used, {said}"):
        assert torch.equal(_logits(MxfxForCausalLM.from_pretrained(folder)), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _no_emission(monkeypatch)
        MxfxForCausalLM.from_pretrained(folder)


def test_of_another_model_nothing_stays_in_a_folder(shipped: Callable[[str], Path], tmp_path: Path) -> None:
    MxfxForCausalLM.from_pretrained(shipped("llama-tiny rotated")).save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "emitted-cpu.safetensors").is_file()
    MxfxForCausalLM.from_pretrained(shipped("llama-tiny")).save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model" / "emitted-cpu.safetensors").exists()
    expected = (shipped("llama-tiny") / "emitted-cpu.mxir").read_bytes()
    assert (tmp_path / "model" / "emitted-cpu.mxir").read_bytes() == expected


def _full(*args: object, **options: object) -> None:
    raise files.WriteError(28, "could not write 9 bytes: No space left on device; free space", "there")


def test_a_full_disk_leaves_a_folder_that_opens(
    shipped: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = MxfxForCausalLM.from_pretrained(shipped("llama-tiny"))
    monkeypatch.setattr(kept, "write_file", _full)
    with pytest.warns(UserWarning, match="has no program for cpu that opens at once: .*No space left"):
        model.save_pretrained(tmp_path / "model")
    assert torch.equal(_logits(MxfxForCausalLM.from_pretrained(tmp_path / "model")), _logits(model))


def test_a_full_disk_of_the_cache_is_said_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "write_file", _full)
    with pytest.warns(UserWarning, match="No space left") as said:
        first, second = (MxfxForCausalLM.from_pretrained(folder) for _ in range(2))
    assert len([one for one in said if "No space" in str(one.message)]) == 1
    assert torch.equal(_logits(second), _logits(first))
