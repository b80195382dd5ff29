"""``gptq``: calibrated rounding, layer by layer, resumable to the byte."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mxfx.calibration.checkpoints import CheckpointError
from mxfx.config import ConfigError, Pipeline, check_order
from mxfx.formats import parse
from mxfx.graph.execute import execute
from mxfx.graph.node import path_of
from mxfx.graph.program import Program
from mxfx.graph.tiny import tiny
from mxfx.graph.trace import trace
from mxfx.ground.files import WriteError
from mxfx.passes import Annotate, InsertFakeQuant, RaiseAttention, RaiseNorm, RaiseRope, RoundWeights, Rule
from mxfx.passes.gptq import Gptq
from mxfx.rewrite import Applied, Context, ExpectationError, MissingCalibration, Selector, apply
from mxfx.rewrite.context import StrictError
from mxfx.rewrite.operands import is_rounded
from tests.algorithms.one_weight import gptq as solve

_TOKENS = torch.randint(3, 128, (6, 24), generator=torch.Generator().manual_seed(3))
_PROJECTIONS = Selector(r".*proj")
_V_PROJ = "model.layers.0.self_attn.v_proj.weight"


@cache
def _annotated(fmt: str = "mxint4@32", match: str = r".*proj", layers: int = 2, inputs: bool = False) -> Program:
    program = trace(tiny("llama-tiny", layers=layers))
    rule = Rule(Selector(match), weight=parse(fmt), input=parse(fmt) if inputs else None)
    for pass_ in (RaiseNorm(), RaiseRope(), RaiseAttention(), Annotate((rule,))):
        program = apply(pass_, program).program
    return program


def _run(
    program: Program | None = None, ctx: Context | None = None, limit: int | None = None, **options: object
) -> Applied:
    pass_ = Gptq(**{"batch_size": 4, **options})  # type: ignore[arg-type]
    return apply(pass_, program or _annotated(), ctx or Context(tokens=lambda: _TOKENS), limit=limit)


def _weights(program: Program) -> dict[str, Tensor]:
    return {program.weight_of(n): program.weights[program.weight_of(n)] for n in program.nodes("linear")}


def _same(one: Program, other: Program) -> bool:
    mine, theirs = _weights(one), _weights(other)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def _output_error(program: Program, reference: Program) -> float:
    y = execute(reference, _TOKENS)
    return float((execute(program, _TOKENS) - y).norm() / y.norm())


# What it does to the weights.


@pytest.mark.parametrize("fmt", ["mxint4@32", "mxfp4_e2m1@32", "mxfp6_e3m2@16", "mxint4@32/ceil"])
def test_weights_end_on_their_grid_and_round_weights_leaves_them_alone(fmt: str) -> None:
    applied = _run(_annotated(fmt))
    rounded = apply(RoundWeights(), applied.program)
    assert len(applied.record.matches) == 14
    assert all(is_rounded(node, "weight") for node in applied.program.nodes("linear") if _PROJECTIONS(node))
    assert _same(rounded.program, applied.program)
    element = parse(fmt).element
    for name, weight in _weights(applied.program).items():
        if name == "lm_head.weight":
            continue
        # On the grid: some power of two per block makes every value an element.
        blocks = weight.unflatten(-1, (-1, parse(fmt).block)).double()  # type: ignore[arg-type]
        scales = 2.0 ** torch.arange(-24.0, 8.0, dtype=torch.float64)
        scaled = blocks[..., None, :] / scales[:, None]
        fits = (element.round(scaled) == scaled).all(-1).any(-1)
        assert fits.all(), name


def test_outputs_are_nearer_than_with_rounding_to_nearest() -> None:
    program = _annotated("mxint4@32")
    nearest = apply(RoundWeights(), program).program
    assert _output_error(_run().program, program) < 0.8 * _output_error(nearest, program)


def test_the_loss_of_no_linear_is_above_that_of_rounding_to_nearest() -> None:
    linears = _run().record.details["linears"]
    assert len(linears) == 14  # type: ignore[arg-type]
    assert all(one["loss"] <= one["rtn_loss"] for one in linears)  # type: ignore[union-attr]


def test_streaming_gives_what_the_whole_graph_gives() -> None:
    """The same as running the whole model before each linear, with everything before it rewritten."""
    streamed = _run()
    whole = _annotated().copy()
    for names in _groups(whole):
        x = _read_by(whole, names[0])
        hessian = x.mT @ x
        for name in names:
            node = next(n for n in whole.nodes("linear") if n.name == name)
            result = solve(whole.weights[whole.weight_of(node)], hessian, parse("mxint4@32"))
            whole.weights.set(whole.weight_of(node), result.weight, "test")
    for name, weight in _weights(whole).items():
        other = _weights(streamed.program)[name]
        # Sums in another order can flip a code that lies on a tie.
        assert (weight != other).float().mean() < 0.01, name


def _groups(program: Program) -> list[list[str]]:
    groups: dict[object, list[str]] = {}
    for node in program.nodes("linear"):
        if _PROJECTIONS(node):
            groups.setdefault(node.args[0], []).append(node.name)
    return list(groups.values())


def _read_by(program: Program, linear: str) -> Tensor:
    source = next(n for n in program.nodes("linear") if n.name == linear).args[0]
    found: list[Tensor] = []
    execute(program, _TOKENS, observe=lambda n, v: found.append(v) or v if n is source else v)  # type: ignore[arg-type, func-returns-value]
    return found[0].reshape(-1, found[0].shape[-1])


def test_the_users_model_and_program_stay_as_they_were() -> None:
    before = {name: tensor.clone() for name, tensor in _annotated().weights.items()}
    _run()
    assert all(torch.equal(tensor, before[name]) for name, tensor in _annotated().weights.items())


# What it takes.


def test_it_takes_what_is_annotated_and_selected() -> None:
    applied = _run(select=Selector(r".*\.mlp\..*"))
    assert sorted({m.path.split(".")[-1] for m in applied.record.matches}) == ["down_proj", "gate_proj", "up_proj"]


def test_what_was_rounded_to_nearest_before_stays_and_the_rest_is_calibrated() -> None:
    """``round-weights{select=…}`` then ``gptq``: the first leaves codes that the second must not move."""
    before = _annotated()
    part = apply(RoundWeights(select=Selector(r".*\.down_proj")), before).program
    after = _run(part)
    nearest, alone = apply(RoundWeights(), before).program, _run(before).program
    assert {m.path.split(".")[-1] for m in after.record.matches} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"
    }  # fmt: skip
    for node in filter(_PROJECTIONS, before.nodes("linear")):
        name = before.weight_of(node)
        made = after.program.weights[name]
        assert torch.equal(made, nearest.weights[name]) == name.endswith("down_proj.weight"), name
        assert is_rounded(next(n for n in after.program.nodes("linear") if n.name == node.name), "weight")
    # The error of the layers before is what the later ones compensate: they are other codes than without.
    last = "model.layers.1.self_attn.q_proj.weight"
    assert not torch.equal(after.program.weights[last], alone.weights[last])
    assert _output_error(after.program, before) < _output_error(nearest, before)


def test_the_head_is_taken_if_annotated_and_its_own() -> None:
    program = trace(tiny("qwen2-tiny"))
    rule = Rule(Selector(r"lm_head|.*down_proj"), weight=parse("mxint4@32"))
    for pass_ in (RaiseNorm(), RaiseRope(), RaiseAttention(), Annotate((rule,))):
        program = apply(pass_, program).program
    assert [m.path for m in _run(program).record.matches][-1] == "lm_head"


def test_a_tied_head_is_left_alone_with_the_reason() -> None:
    skips = _run(_annotated(match="lm_head|.*down_proj")).record.skips
    assert [(s.path, "untie" in s.reason) for s in skips] == [("lm_head", True)]


def test_max_layers_stops_and_says_so() -> None:
    applied = _run(max_layers=1)
    assert {m.path.split(".")[2] for m in applied.record.matches} == {"0"}
    assert all("max_layers = 1" in s.reason for s in applied.record.skips)
    assert len(applied.record.skips) == 7


def test_a_bisect_limit_gives_the_beginning_of_the_whole_run() -> None:
    whole, part = _run(), _run(limit=9)
    taken = [program_path.path for program_path in part.record.matches]
    assert len(taken) == 9
    for node in part.program.nodes("linear"):
        name = part.program.weight_of(node)
        source = whole.program if path_of(node) in taken else _annotated()
        assert torch.equal(part.program.weights[name], source.weights[name]), path_of(node)


def test_annotations_decide_formats_linear_by_linear() -> None:
    program = trace(tiny("llama-tiny"))
    rules = (
        Rule(Selector(r".*q_proj"), weight=parse("mxint8@32")),
        Rule(Selector(r".*[kv]_proj"), weight=parse("mxint4@16")),
    )
    for pass_ in (RaiseNorm(), RaiseRope(), RaiseAttention(), Annotate(rules)):
        program = apply(pass_, program).program
    assert [m.note for m in _run(program).record.matches] == 2 * ["mxint8@32", "mxint4@16", "mxint4@16"]


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        (Gptq(), r"\[0\] gptq or \[1\] gptq, not both, or a select for each$"),
        (Gptq(select=Selector(".*q_proj")), r"\[1\] gptq before \[0\] gptq\n  .* possible: \[1\] gptq, \[0\] gptq$"),
    ],
)
def test_a_second_gptq_over_the_same_weights_is_refused_before_a_run(second: Gptq, expected: str) -> None:
    """Each weight is on its grid by then, which it found hours later."""
    facts = _annotated().facts
    with pytest.raises(ConfigError, match=f"expected: {expected}"):
        check_order(Pipeline([Gptq(), second]), facts)
    for first in (Gptq(select=Selector(".*[kv]_proj")), Gptq(max_layers=1)):
        check_order(Pipeline([first, second]), facts)


def test_nothing_to_take_is_an_error() -> None:
    with pytest.raises(ExpectationError, match=r"takes nothing: select = '.*q_prj' fits no node; .*\.q_proj'$"):
        _run(select=Selector(".*q_prj"))
    with pytest.raises(ExpectationError, match=r"takes nothing: no linear that select = 'lm_head' matches has a"):
        _run(select=Selector("lm_head"))


def test_quantized_inputs_decides_what_is_measured() -> None:
    annotated = _annotated(inputs=True)
    quantized = apply(InsertFakeQuant(), annotated).program
    assert _same(_run(annotated, quantized_inputs=True).program, _run(quantized).program)
    assert _same(_run(quantized, quantized_inputs=False).program, _run(annotated).program)
    assert not _same(_run(quantized).program, _run(annotated).program)


def test_the_asymmetric_target_is_the_plain_one_where_inputs_are_equal() -> None:
    only_first = _annotated(match=r"model\.layers\.0\.self_attn\.q_proj")
    assert _same(_run(only_first, asymmetric=0.5).program, _run(only_first).program)


def test_tokens_that_the_loss_minds_change_the_weights_and_keep_the_bound() -> None:
    guided = _run(guided=True)
    assert not _same(guided.program, _run().program)
    assert all(one["loss"] <= one["rtn_loss"] for one in guided.record.details["linears"])  # type: ignore[union-attr]


def test_the_asymmetric_target_changes_the_weights_where_inputs_are_quantized() -> None:
    quantized = apply(InsertFakeQuant(), _annotated(inputs=True)).program
    assert not _same(_run(quantized, asymmetric=0.25).program, _run(quantized).program)


# What goes wrong.


def test_without_calibration_data_the_error_says_what_to_add() -> None:
    with pytest.raises(MissingCalibration, match="--data"):
        _run(ctx=Context())


def test_more_samples_than_there_are_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"samples = 7.*6 samples of 24 tokens"):
        _run(samples=7)


def test_fewer_samples_are_taken_from_the_front() -> None:
    front = Context(tokens=lambda: _TOKENS[:2, :8])
    assert _same(_run(samples=2, length=8).program, _run(ctx=front).program)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("damp", -1.0),
        ("damp", float("inf")),
        ("asymmetric", 1.5),
        ("batch_size", 0),
        ("samples", 0),
        ("max_layers", 0),
        ("refine", -1),
    ],
)
def test_options_out_of_range_are_named(option: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{option} must be"):
        Gptq(**{option: value})  # type: ignore[arg-type]


@pytest.fixture
def no_factorization(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Cholesky factorization that fails whatever the damping."""
    real = torch.linalg.cholesky_ex

    def failing(matrix: Tensor, **options: object) -> tuple[Tensor, Tensor]:
        factor, code = real(matrix, **options)
        return factor, torch.ones_like(code)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", failing)


def test_a_failed_factorization_is_rounding_to_nearest_counted_and_warned_of(no_factorization: None) -> None:
    applied = _run()
    assert applied.record.details["fallbacks"] == 14
    assert "rounded to nearest instead" in applied.record.warnings[0]
    assert _same(applied.program, apply(RoundWeights(), _annotated()).program)


def test_a_failed_factorization_ends_a_strict_run(no_factorization: None) -> None:
    with pytest.raises(StrictError, match="q_proj"):
        _run(ctx=Context(tokens=lambda: _TOKENS, strict=True))


@pytest.mark.parametrize("asymmetric", [0.0, 0.25])
def test_inputs_of_zeros_are_rounded_to_nearest_and_warned_of(asymmetric: float) -> None:
    silent = _annotated().copy()
    silent.weights.set(_V_PROJ, torch.zeros_like(silent.weights[_V_PROJ]), "test")
    record = _run(silent, asymmetric=asymmetric, max_layers=1).record
    assert record.details["fallbacks"] == 1
    (warning,) = record.warnings
    assert warning.startswith("model.layers.0.self_attn.o_proj: calibration gave it inputs of zeros alone")


def test_a_target_that_cannot_be_solved_for_names_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mxfx.passes.gptq._RIDGE", -1e3)
    with pytest.raises(ValueError, match=r"0\.self_attn\.q_proj\.weight.*\(read by .*set asymmetric = 0"):
        _run(asymmetric=0.25)


# Checkpoints.


def _layers(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/layer-*.safetensors"))


def test_a_finished_run_is_read_back_and_not_solved_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = _run(checkpoint_dir=tmp_path)
    monkeypatch.setattr("mxfx.passes.gptq.gptq_batch", lambda *a, **k: pytest.fail("solved again"))
    second = _run(checkpoint_dir=tmp_path)
    assert second.record.details["resumed_layers"] == 2
    assert _same(first.program, second.program)
    assert second.record.details["linears"] == first.record.details["linears"]
    assert [m.note for m in second.record.matches] == [m.note for m in first.record.matches]


def test_a_run_that_stopped_goes_on_with_the_right_activations(tmp_path: Path) -> None:
    _run(_annotated(layers=3), checkpoint_dir=tmp_path, max_layers=1)
    resumed = _run(_annotated(layers=3), checkpoint_dir=tmp_path)
    assert resumed.record.details["resumed_layers"] == 1
    assert _same(resumed.program, _run(_annotated(layers=3)).program)


def test_the_cache_of_the_run_is_the_default_place(tmp_path: Path) -> None:
    _run(ctx=Context(tokens=lambda: _TOKENS, cache=tmp_path))
    assert len(_layers(tmp_path / "gptq")) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"damp": 0.02},
        {"order": "none"},
        {"exponents": "rule"},
        {"refine": 1},
        {"batch_size": 3},
        {"samples": 5},
        {"length": 23},
        {"asymmetric": 0.1},
        {"guided": True},
        {"precision": "model", "program": _annotated().twin(torch.float64)},
        {"program": _annotated("mxint8@32")},
        {"program": _annotated(match=r".*(up|down)_proj")},
        {"ctx": Context(tokens=lambda: _TOKENS.flip(0))},
        {"ctx": Context(tokens=lambda: _TOKENS, seed=1)},
    ],
    ids=lambda change: "-".join(change),
)
def test_another_configuration_never_picks_up_a_checkpoint(change: dict, tmp_path: Path) -> None:
    _run(checkpoint_dir=tmp_path, max_layers=1)
    assert _run(checkpoint_dir=tmp_path, max_layers=1, **change).record.details["resumed_layers"] == 0
    assert len(list(tmp_path.iterdir())) == 2


def test_another_model_never_picks_up_a_checkpoint(tmp_path: Path) -> None:
    _run(checkpoint_dir=tmp_path)
    other = _annotated().copy()
    other.weights.set("model.norm.weight", other.weights["model.norm.weight"] + 1, "test")
    assert _run(other, checkpoint_dir=tmp_path).record.details["resumed_layers"] == 0


@pytest.mark.parametrize("options", [{"activations": "disk"}, {"max_layers": 1}], ids=["placement", "max_layers"])
def test_what_does_not_change_results_shares_checkpoints(options: dict, tmp_path: Path) -> None:
    _run(checkpoint_dir=tmp_path)
    assert _run(checkpoint_dir=tmp_path, **options).record.details["resumed_layers"] > 0  # type: ignore[operator]


def test_activation_formats_that_nothing_measures_do_not_matter(tmp_path: Path) -> None:
    """Config C quantizes activations after GPTQ: it reuses config B's results."""
    _run(checkpoint_dir=tmp_path)
    assert _run(_annotated(inputs=True), checkpoint_dir=tmp_path).record.details["resumed_layers"] == 2


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [_truncate, _flip_bit, Path.unlink, lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_damaged_layer_is_done_again_with_a_warning(damage: Callable, layer: int, tmp_path: Path) -> None:
    first = _run(checkpoint_dir=tmp_path)
    damage(_layers(tmp_path)[layer])
    again = _run(checkpoint_dir=tmp_path)
    assert again.record.details["resumed_layers"] == 1
    assert f"layer-{layer:05d}" in again.record.warnings[0]
    assert _same(first.program, again.program)
    assert _run(checkpoint_dir=tmp_path).record.warnings == []


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]\n", b'{"schema": 2}\n', b"\xff", b'{"schema": 1, "key": "x"}\n{"layer": "../x"}\n']
)
def test_a_damaged_manifest_costs_time_and_nothing_else(content: bytes, tmp_path: Path) -> None:
    first = _run(checkpoint_dir=tmp_path)
    next(tmp_path.glob("*/manifest.jsonl")).write_bytes(content)
    again = _run(checkpoint_dir=tmp_path)
    assert again.record.details["resumed_layers"] == 0
    assert "cannot be read" in again.record.warnings[0]
    assert _same(first.program, again.program)


def test_layers_that_follow_another_result_are_done_again(tmp_path: Path) -> None:
    """A layer's checkpoint is good only behind the very layers that it was computed behind."""
    first = _run(checkpoint_dir=tmp_path)
    manifest = next(tmp_path.glob("*/manifest.jsonl"))
    header, zero, one = map(json.loads, manifest.read_text().splitlines())
    manifest.write_text("\n".join(map(json.dumps, (header, zero, one | {"follows": zero["follows"]}))) + "\n")
    again = _run(checkpoint_dir=tmp_path)
    assert again.record.details["resumed_layers"] == 1
    assert "follows" in again.record.warnings[0]
    assert _same(first.program, again.program)


@pytest.mark.parametrize("code", [28, 5], ids=["ENOSPC", "EIO"])
@pytest.mark.parametrize("call", [1, 2, 3, 4, 5, 6])
def test_a_failing_disk_is_one_clear_error_and_nothing_half_written(
    code: int, call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.fsync, []

    def failing(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == call:
            raise OSError(code, os.strerror(code))
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        with pytest.raises(WriteError, match=os.strerror(code)):
            _run(checkpoint_dir=tmp_path)
    assert not list(tmp_path.glob("*/*.part"))
    resumed = _run(checkpoint_dir=tmp_path)
    assert not [w for w in resumed.record.warnings if "damaged" not in w]
    assert _same(resumed.program, _run().program)


def test_a_folder_in_use_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from filelock import FileLock

    monkeypatch.setattr("mxfx.calibration.checkpoints._LOCK_SECONDS", 0.1)
    _run(checkpoint_dir=tmp_path)
    with FileLock(next(tmp_path.iterdir()) / ".lock"), pytest.raises(CheckpointError, match="in use by another run"):
        _run(checkpoint_dir=tmp_path)


# Killed at any moment.

_VICTIM = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from mxfx.ground import files
from mxfx.export.artefact import load
from mxfx.passes.gptq import Gptq
from mxfx.rewrite import Context, apply
import builtins

source, folder = Path(sys.argv[1]), Path(sys.argv[2])
tokens = torch.randint(3, 128, (2, 8), generator=torch.Generator().manual_seed(3))
program = load(source)

def run(kill_at):
    '''Run in a child that kills itself before its kill_at-th step towards the disk; True if it got to the end.'''
    child = os.fork()
    if child:
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        # Anything else would be tried again for ever.
        assert ended in (0, -signal.SIGKILL), f"the child failed by itself: {ended}"
        return ended == 0
    left = [kill_at]
    def counted(function):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return call
    os.fsync, os.replace, os.open, os.close = map(counted, (os.fsync, os.replace, os.open, os.close))
    class Torn:
        '''A file whose write can be cut in the middle.'''
        def __init__(self, file): self.file = file
        def __enter__(self): return self
        def __exit__(self, *error): self.file.close()
        def write(self, data):
            for part in (data[: len(data) // 2], data[len(data) // 2 :]):
                counted(self.file.write)(part); self.file.flush()
        def flush(self): self.file.flush()
        def fileno(self): return self.file.fileno()
    files.open = lambda path, mode: Torn(builtins.open(path, mode))
    apply(Gptq(checkpoint_dir=folder / "victim"), program, Context(tokens=lambda: tokens))
    os._exit(0)

def digest(result):
    return [result.weights.hash(name) for name in sorted(result.weights)]

whole = digest(apply(Gptq(), program, Context(tokens=lambda: tokens)).program)
first, step = int(sys.argv[3]), int(sys.argv[4])
points = 0
kill_at = first
import shutil
while True:
    shutil.rmtree(folder / "victim", ignore_errors=True)
    finished = run(kill_at)
    resumed = apply(Gptq(checkpoint_dir=folder / "victim"), program, Context(tokens=lambda: tokens))
    assert digest(resumed.program) == whole, f"killed at {kill_at}: other weights"
    assert not list((folder / "victim").glob("*/*.part")), f"killed at {kill_at}: half a file stays"
    if finished:
        break
    points += 1
    kill_at += step
print(points)
"""


def _sweep(tmp_path: Path, first: int, step: int, layers: int) -> int:
    """Kill a run before its ``first``-th step towards the disk, then ``step`` later, … ; the number of kills."""
    from mxfx.export.artefact import save

    program = _annotated(match=r".*(q|down)_proj", layers=layers)
    save(program, tmp_path / "model")
    command = [sys.executable, "-c", _VICTIM, str(tmp_path / "model"), str(tmp_path), str(first), str(step)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout)


def test_a_killed_run_continues_to_the_same_bytes(tmp_path: Path) -> None:
    assert _sweep(tmp_path, first=4, step=11, layers=3) >= 3


@pytest.mark.thorough
def test_a_run_killed_at_any_moment_continues_to_the_same_bytes(tmp_path: Path) -> None:
    assert _sweep(tmp_path, first=1, step=1, layers=6) >= 40
