"""What the emit stage made of a folder is read by the next process that opens it, and is never another's."""

from __future__ import annotations

import json
import shutil
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
_ROUND = '[[pass]]\nname = "insert-fake-quant"'
_ROTATE = '[[pass]]\nname = "online-rotation"\n'
_IDS = torch.arange(3, 25).view(2, 11)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MXFX_CACHE", str(tmp_path / "cache"))
    files._say_not_kept.cache_clear()
    return tmp_path / "cache" / "emitted"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family) / "model"
            name, _, rotated = family.partition(" ")
            text = _PIPELINE.replace(_ROUND, _ROTATE + _ROUND) if rotated else _PIPELINE
            pipeline = loads(text).completed().emitted("cpu")
            save_folder(PassManager().run(trace(tiny(name)), pipeline).portable, made[family])
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


@pytest.mark.parametrize("family", ["llama-tiny", "gemma3-tiny", "phi3-tiny", "llama-tiny rotated"])
def test_the_second_opening_runs_no_pass_and_gives_the_same_bits(
    family: str, saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = MxfxForCausalLM.from_pretrained(saved(family))
    _no_emission(monkeypatch)
    second = MxfxForCausalLM.from_pretrained(saved(family))
    assert torch.equal(_logits(second), _logits(first))
    assert second.graph.code == first.graph.code and second.specs == first.specs
    mine, theirs = second.graph.state_dict(), first.graph.state_dict()
    assert list(mine) == list(theirs) and all(torch.equal(mine[n], theirs[n]) for n in mine)
    assert all(mine[n].dtype == theirs[n].dtype for n in mine)
    assert torch.equal(second.generate(_IDS, max_new_tokens=4), first.generate(_IDS, max_new_tokens=4))
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
