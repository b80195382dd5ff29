"""A program on disk comes back bit for bit; anything else in the folder gives one clear error."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mxfx.export.artefact import MANIFEST, PROGRAM, WEIGHTS, ArtefactError, load, save
from mxfx.formats import parse
from mxfx.graph.module import build
from mxfx.graph.program import Program
from mxfx.graph.text import to_text
from mxfx.graph.tiny import tiny
from mxfx.graph.trace import trace
from mxfx.ground.files import WriteError
from mxfx.ops import fake_quantize
from mxfx.passes import (
    Annotate,
    FuseHadamardQuant,
    InsertFakeQuant,
    Lower,
    PackWeights,
    RaiseAttention,
    RaiseNorm,
    RaiseRope,
    RoundWeights,
    Rule,
    TransformInputs,
)
from mxfx.rewrite import Context, Rewriter, Selector, apply
from mxfx.rewrite.rewriter import clean
from tests.mixtures import traced_mixture
from tests.programs import passed

_IDS = torch.arange(3, 25).view(2, 11)
_MXINT4 = parse("mxint4@32")


@cache
def _program(family: str = "llama-tiny") -> Program:
    """A quantized program: annotations, notes, quantizers and rounded weights are all there."""
    program = trace(tiny(family))
    rule = Rule(Selector(r"model\.layers\.\d+\.mlp\.\w+"), weight=_MXINT4, input=_MXINT4)
    for pass_ in (RaiseNorm(), RaiseRope(), RaiseAttention(), Annotate((rule,)), InsertFakeQuant(), RoundWeights()):
        program = apply(pass_, program).program
    return program


def _logits(program: Program) -> torch.Tensor:
    with torch.no_grad():
        return build(apply(Lower(), program).program)(_IDS)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artefact") / "model"
    save(_program(), folder)
    return folder


@pytest.fixture
def saved(original: Path, tmp_path: Path) -> Path:
    """A copy of a good artefact, to be damaged."""
    return Path(shutil.copytree(original, tmp_path / "model"))


@pytest.mark.parametrize("family", ["llama-tiny", "gemma3-tiny", "phi3-tiny"])
def test_a_program_comes_back_as_it_was(family: str, tmp_path: Path) -> None:
    save(_program(family), tmp_path)
    back = load(tmp_path)
    assert to_text(back) == to_text(_program(family))
    assert torch.equal(_logits(back), _logits(_program(family)))


def test_logits_are_bit_equal_in_a_fresh_process(saved: Path, tmp_path: Path) -> None:
    script = (
        "import sys, torch; from safetensors.torch import save_file; import mxfx.passes as p;"
        "from mxfx.export.artefact import load; from mxfx.graph.module import build; from mxfx.rewrite import apply;"
        "g = build(apply(p.Lower(), load(sys.argv[1])).program);"
        "save_file({'y': g(torch.arange(3, 25).view(2, 11)).detach()}, sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", script, str(saved), str(tmp_path / "y.safetensors")], check=True)
    assert torch.equal(load_file(tmp_path / "y.safetensors")["y"], _logits(_program()))


def test_lowered_programs_and_transforms_come_back_too(tmp_path: Path) -> None:
    tokens = torch.randint(3, 128, (2, 16))
    rule = Rule(Selector(r".*mlp.*"), weight=_MXINT4, input=_MXINT4)
    program = trace(tiny("llama-tiny"))
    passes = (RaiseNorm(), RaiseRope(), RaiseAttention(), Annotate((rule,)), TransformInputs(), InsertFakeQuant())
    for pass_ in (*passes, FuseHadamardQuant(), Lower()):
        program = apply(pass_, program, Context(tokens=lambda: tokens)).program
    save(program, tmp_path)
    with torch.no_grad():
        assert torch.equal(build(load(tmp_path))(_IDS), build(program)(_IDS))


def test_a_program_with_kernels_comes_back_too(tmp_path: Path) -> None:
    rule = Rule(Selector(r".*mlp.*"), weight=_MXINT4, input=_MXINT4)
    program = trace(tiny("llama-tiny"))
    for pass_ in (RaiseNorm(), RaiseRope(), RaiseAttention(), Annotate((rule,)), InsertFakeQuant()):
        program = apply(pass_, program).program
    # The kernel's op runs its definition on a CPU.
    program = apply(Lower(), program).program.copy()
    rw = Rewriter(program, "test")
    for node in program.nodes():
        if node.target is fake_quantize:
            rw.replace(node, rw.call(torch.ops.mxfx_kernels.fake_quantize.default, *node.args, like=node))
    clean(program)
    save(program, tmp_path)
    assert "mxfx_kernels.fake_quantize" in (tmp_path / PROGRAM).read_text()
    with torch.no_grad():
        assert torch.equal(build(load(tmp_path))(_IDS), build(program)(_IDS))


def test_weights_lie_in_memory_as_they_did_and_products_keep_their_last_bits(tmp_path: Path) -> None:
    program = passed(traced_mixture("gpt_oss"), (RaiseNorm(), RaiseRope(), RaiseAttention()))
    save(program, tmp_path)
    again = load(tmp_path)
    odd = {name: t.stride() for name, t in program.weights.items() if not t.is_contiguous()}
    assert odd and odd == {name: t.stride() for name, t in again.weights.items() if not t.is_contiguous()}
    assert torch.equal(_logits(again), _logits(program))


def test_saving_again_replaces_what_was_there(saved: Path) -> None:
    save(_program("qwen2-tiny"), saved)
    assert load(saved).source.name == "qwen2-tiny"


def test_nothing_in_the_folder_is_pickled(saved: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == [MANIFEST, PROGRAM, WEIGHTS]
    assert load_file(saved / WEIGHTS)
    assert json.loads((saved / MANIFEST).read_text())["schema"] == 1


# Damage.


def _seal(folder: Path) -> None:
    """Make the manifest fit the files again: the damage must be found by what the files say."""
    text = (folder / PROGRAM).read_bytes()
    files = {
        PROGRAM: {"bytes": len(text), "blake2b": hashlib.blake2b(text, digest_size=32).hexdigest()},
        WEIGHTS: {"bytes": (folder / WEIGHTS).stat().st_size},
    }
    (folder / MANIFEST).write_text(json.dumps({"schema": 1, "mxfx": "0", "files": files}))


def _cut(name: str, keep: float) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * keep)])

    return damage


def _flip(name: str, where: float) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[int(len(data) * where)] ^= 0x01
        (folder / name).write_bytes(data)

    return damage


def _manifest(**changes: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        manifest = json.loads((folder / MANIFEST).read_text()) | changes
        (folder / MANIFEST).write_text(json.dumps({k: v for k, v in manifest.items() if v is not None}))

    return damage


def _write(name: str, data: bytes, seal: bool = False) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_bytes(data)
        if seal:
            _seal(folder)

    return damage


def _text(old: str, new: str) -> Callable[[Path], None]:
    """Change the program's text and seal the folder again."""

    def damage(folder: Path) -> None:
        text = (folder / PROGRAM).read_text()
        assert old in text, f"the damage {old!r} → {new!r} does nothing"
        (folder / PROGRAM).write_text(text.replace(old, new, 1))
        _seal(folder)

    return damage


def _tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
        change(tensors)
        save_file(tensors, folder / WEIGHTS)
        _seal(folder)

    return damage


def _remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _add_one(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] += 1


def _swap(tensors: dict[str, torch.Tensor]) -> None:
    q, k = "model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"
    tensors[q], tensors[k] = tensors[k], tensors[q]


_DAMAGE: dict[str, Callable[[Path], None]] = {
    "no manifest": _remove(MANIFEST),
    "no program": _remove(PROGRAM),
    "no weights": _remove(WEIGHTS),
    "empty manifest": _write(MANIFEST, b""),
    "manifest cut": _cut(MANIFEST, 0.5),
    "manifest is a list": _write(MANIFEST, b"[]"),
    "manifest is no UTF-8": _write(MANIFEST, b"\xff\xfe"),
    "manifest nests too deep": _write(MANIFEST, b"[" * 100_000),
    "manifest without schema": _manifest(schema=None),
    "newer schema": _manifest(schema=2),
    "manifest without files": _manifest(files=None),
    "manifest names another file": _manifest(files={"../evil": {"bytes": 1}}),
    "manifest without sizes": _manifest(files={PROGRAM: {}, WEIGHTS: {}}),
    "layouts are a number": _manifest(layouts=7),
    "layout of a stranger": _manifest(layouts={"strange": [1, 0]}),
    "layout of another axis": _manifest(layouts={"model.norm.weight": [1]}),
    "layout in words": _manifest(layouts={"model.norm.weight": ["0"]}),
    "manifest with a size in words": _manifest(files={PROGRAM: {"bytes": "1"}, WEIGHTS: {"bytes": True}}),
    "program empty": _cut(PROGRAM, 0),
    "program cut": _cut(PROGRAM, 0.7),
    "program changed": _flip(PROGRAM, 0.6),
    "program is no UTF-8": _write(PROGRAM, b"\xff\xfe\x00", seal=True),
    "program is another text": _write(PROGRAM, b"hello", seal=True),
    "program sealed after a cut": lambda folder: (_cut(PROGRAM, 0.7)(folder), _seal(folder)),  # type: ignore[dict-item]
    "program without return": _text("  return ", "  returm "),
    "another IR version": _text("mxfx-ir 1", "mxfx-ir 9"),
    "config is no JSON": _text("config {", "config {{"),
    "a header line twice": _text("dtype ", "dtype float32\ndtype "),
    "an op that does not exist": _text("aten.linear(", "aten.linearr("),
    "a call of Python": _text("aten.linear(", "os.system("),
    "a call of an operator that calls": _text("aten.linear(", "operator.methodcaller("),
    "a call that opens a file": _text("aten.linear(", "aten.from_file("),
    "a call of the registry": _text("aten.linear(", "runtime.define("),
    "a call into another namespace": _text("aten.linear(", "prims.add("),
    "an operand too few": _text("aten.silu(%fake_quantize_default_1)", "aten.silu()"),
    "an operand that is not there": _text("aten.silu(%fake_quantize_default_1)", "aten.silu(%linear_444)"),
    "an operand that comes later": _text("aten.silu(%fake_quantize_default_1)", "aten.silu(%linear_5)"),
    "a weight that is not there": _text("@model.norm.weight,", "@model.norm.wait,"),
    "shapes that do not fit": _text("@model.layers.0.mlp.down_proj.weight)", "@model.layers.0.mlp.up_proj.weight)"),
    "a format that does not exist": _text("weight: mxint4@32", "weight: mxint4@0"),
    "a dtype that does not exist": _text(" : f32[64] #", " : f33[64] #"),
    "weights cut": _cut(WEIGHTS, 0.9),
    "weights empty": _cut(WEIGHTS, 0),
    "weights are no safetensors": _write(WEIGHTS, b"PK\x03\x04" * 10, seal=True),
    "weights with a header of 2^60 bytes": _write(WEIGHTS, (1 << 60).to_bytes(8, "little") + b"{}", seal=True),
    "weights with a flipped bit": _flip(WEIGHTS, 0.7),
    "weights with a flipped bit in the header": _flip(WEIGHTS, 0.0005),
    "a weight changed": _tensors(_add_one),
    "two weights swapped": _tensors(_swap),
    "a weight missing": _tensors(lambda tensors: tensors.pop("model.norm.weight")),  # type: ignore[arg-type, return-value]
    "a weight too many": _tensors(lambda tensors: tensors.update(x=torch.zeros(1))),
    "a weight of another dtype": _tensors(lambda t: t.update({"model.norm.weight": t["model.norm.weight"].half()})),
    "a weight of another shape": _tensors(
        lambda t: t.update({"model.norm.weight": t["model.norm.weight"][:32].clone()})
    ),
}


@pytest.mark.parametrize("damage", _DAMAGE.values(), ids=_DAMAGE)
def test_damage_gives_one_clear_error(damage: Callable[[Path], None], saved: Path) -> None:
    damage(saved)
    with pytest.raises(ArtefactError) as caught:
        load(saved)
    assert str(saved) in str(caught.value), "the error says where"


def test_a_sealed_artefact_with_nan_is_refused(saved: Path) -> None:
    program = _program().copy()
    program.weights.set("model.norm.weight", torch.full((64,), torch.nan), "test")
    with pytest.raises(ArtefactError, match=r"model\.norm\.weight.*NaN"):
        save(program, saved)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="nowhere"):
        load(tmp_path / "nowhere")


def test_programs_without_weights_are_not_saved(tmp_path: Path) -> None:
    program = _program().copy()
    program.weights._tensors["model.norm.weight"] = torch.empty(64, device="meta")
    with pytest.raises(ArtefactError, match="no data"):
        save(program, tmp_path)


def test_a_full_disk_leaves_no_artefact(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(WriteError, match="No space left on device"):
        save(_program(), saved)
    assert not list(saved.glob("*.part"))
    with pytest.raises(ArtefactError, match="cut short"):
        load(saved)


def test_a_model_that_no_run_emitted_is_called_one_with_the_command_that_takes_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(
        ArtefactError,
        match=r"a model that no run emitted; `mxfx run FILE --model .* --out OUT` makes an emitted one of it",
    ):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "mxfx"}')
    with pytest.raises(ArtefactError, match="cut short"):
        load(tmp_path)


def test_a_file_that_may_not_be_read_is_called_so(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """safetensors says that there is no such file."""

    def hidden(path: Path) -> None:
        raise FileNotFoundError(f"No such file or directory: {path}")

    monkeypatch.setattr("mxfx.export.artefact.load_file", hidden)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(ArtefactError, match=r"weights\.safetensors: may not be read"):
        load(saved)


def test_the_artefact_can_be_moved(saved: Path, tmp_path: Path) -> None:
    shutil.move(saved, tmp_path / "elsewhere")
    assert torch.equal(_logits(load(tmp_path / "elsewhere")), _logits(_program()))


_SHARD = "weights-{:05d}-of-{:05d}.safetensors"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """An artefact whose weights are in files of at most 40 kB."""
    save(_program(), tmp_path / "sharded", shard_bytes=40_000)
    return tmp_path / "sharded"


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("weights*"))


def test_weights_beyond_the_limit_are_in_several_files(sharded: Path, saved: Path) -> None:
    names = _names(sharded)
    assert names == [_SHARD.format(i, len(names)) for i in range(1, len(names) + 1)] and len(names) > 3
    files = json.loads((sharded / MANIFEST).read_text())["files"]
    assert files.keys() == {PROGRAM, *names}
    parts = [load_file(sharded / name) for name in names]
    assert all(len(part) == 1 or sum(t.nbytes for t in part.values()) <= 40_000 for part in parts)
    assert sum(map(len, parts)) == len(load_file(saved / WEIGHTS))
    back = load(sharded)
    assert to_text(back) == to_text(_program())
    assert torch.equal(_logits(back), _logits(_program()))


def test_a_tensor_larger_than_the_limit_has_a_file_of_its_own(tmp_path: Path) -> None:
    save(_program(), tmp_path, shard_bytes=1)
    assert [len(load_file(tmp_path / name)) for name in _names(tmp_path)] == [1] * len(_program().weights)
    assert torch.equal(_logits(load(tmp_path)), _logits(_program()))


def test_saving_again_leaves_no_file_of_the_other_number(sharded: Path) -> None:
    save(_program(), sharded)
    assert _names(sharded) == [WEIGHTS] and load(sharded)
    save(_program(), sharded, shard_bytes=60_000)
    assert WEIGHTS not in _names(sharded) and load(sharded)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux lists what a process has mapped")
def test_packed_weights_of_every_file_stay_mapped(tmp_path: Path) -> None:
    packed = apply(Lower(), apply(PackWeights(), _program()).program).program
    save(packed, tmp_path, shard_bytes=3_000)
    back = load(tmp_path)
    mapped = Path("/proc/self/maps").read_text()
    codes = {
        name for name in _names(tmp_path) if any(not t.is_floating_point() for t in load_file(tmp_path / name).values())
    }
    assert len(codes) > 3 and [name for name in codes if str(tmp_path / name) not in mapped] == []
    assert torch.equal(build(back)(_IDS), build(packed)(_IDS))


def _only(change: Callable[[list[str]], list[str]]) -> Callable[[Path], None]:
    """Change which files of weights the manifest names."""

    def damage(folder: Path) -> None:
        manifest = json.loads((folder / MANIFEST).read_text())
        kept = [PROGRAM, *change([name for name in manifest["files"] if name != PROGRAM])]
        manifest["files"] = {name: manifest["files"].get(name, {"bytes": 1}) for name in kept}
        (folder / MANIFEST).write_text(json.dumps(manifest))

    return damage


def _twice(folder: Path) -> None:
    """The second file becomes the first one, and the manifest says so."""
    first, second = _names(folder)[:2]
    shutil.copy(folder / first, folder / second)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][second] = manifest["files"][first]
    (folder / MANIFEST).write_text(json.dumps(manifest))


_SHARD_DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "a file missing": (lambda folder: (folder / _names(folder)[1]).unlink(), "00002-of-.*: is missing"),
    "a file cut": (lambda folder: _cut(_names(folder)[-1], 0.5)(folder), "truncated or changed"),
    "a file too many": (
        lambda folder: (folder / _SHARD.format(9, 99)).write_bytes(b""),
        "00009-of-00099.*the manifest does not name it",
    ),
    "a whole file beside them": (
        lambda folder: (folder / WEIGHTS).write_bytes(b""),
        "weights.safetensors: the manifest does not name it",
    ),
    "a name missing": (_only(lambda names: names[1:]), "'files' must name"),
    "a name too many": (_only(lambda names: [*names, WEIGHTS]), "'files' must name"),
    "no name": (_only(lambda names: []), "'files' must name"),
    "a name from elsewhere": (_only(lambda names: [*names[1:], "../" + names[0]]), "'files' must name"),
    "one file twice": (_twice, "another file of weights holds too"),
}


@pytest.mark.parametrize(("damage", "says"), _SHARD_DAMAGE.values(), ids=_SHARD_DAMAGE)
def test_damage_of_files_of_weights_gives_one_clear_error(
    damage: Callable[[Path], None], says: str, sharded: Path
) -> None:
    damage(sharded)
    with pytest.raises(ArtefactError, match=says) as caught:
        load(sharded)
    assert str(sharded) in str(caught.value)
