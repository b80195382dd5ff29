"""``distill``: tuned weights on their grids, nearer to the float model, and nothing else touched."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from mxfx.calibration import staged, teacher
from mxfx.calibration.distillation import Distillation
from mxfx.calibration.layerwise import LayeredModel
from mxfx.calibration.staged import Staged
from mxfx.calibration.training import deterministic, divergence, trainable
from mxfx.config import Pipeline
from mxfx.formats import parse
from mxfx.graph.node import info, path_of, set_info
from mxfx.graph.program import Program
from mxfx.graph.tensor_file import read_tensors
from mxfx.graph.tiny import tiny
from mxfx.graph.trace import trace
from mxfx.ops.attention import attention_bias
from mxfx.ops.catalogue import spec
from mxfx.passes import (
    Annotate,
    Distill,
    FuseNorm,
    InsertFakeQuant,
    RotateQk,
    RoundWeights,
    Rule,
    TransformInputs,
    distill,
)
from mxfx.passes.distill import free_weights
from mxfx.pipeline.manager import PassManager
from mxfx.rewrite import ALL, Context, Rewriter, Selector, apply
from mxfx.rewrite.size import bits_per_weight
from mxfx.runtime.causal_lm import emit

FORMAT = parse("mxint4@32/mse")
TOKENS = torch.randint(3, 128, (48, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def programs() -> tuple[Program, Program]:
    """The float program, and the same one with weights and activations at 4 bits."""
    rule = Rule(Selector(r".*_proj"), weight=FORMAT, input=FORMAT)
    passes = [Annotate(rule=(rule,)), RoundWeights(), InsertFakeQuant()]
    start = trace(tiny("llama-tiny"))
    return start, PassManager().run(start, Pipeline(passes).completed()).program


def _distill(programs: tuple[Program, Program], **options: object):
    start, quantized = programs
    return apply(Distill(**options), quantized, Context(tokens=lambda: TOKENS, reference=start))


def test_a_weight_that_is_computed_is_left_out_with_the_reason_and_the_others_are_tuned(programs) -> None:
    start, quantized = programs
    quantized = quantized.copy()
    linear = next(n for n in quantized.nodes("linear") if "weight" in info(n).formats)
    weight = linear.args[1]
    with quantized.graph.inserting_before(linear):
        cast = quantized.graph.call_function(torch.ops.mxfx.cast.default, (weight, "model"))
    cast.meta = {"val": weight.meta["val"]}
    set_info(cast, info(linear))
    linear.update_arg(1, cast)
    done = _distill((start, quantized), steps=2, batch_size=2)
    assert [(s.path, s.reason) for s in done.record.skips] == [(path_of(linear), "its weight is computed, not stored")]
    assert len(done.record.matches) == 13


def test_held_out_divergence_falls_and_every_weight_lies_on_its_grid(programs) -> None:
    done = _distill(programs, steps=24, batch_size=8, learning_rate=1e-2)
    kl = done.record.details["held_out_kl"]
    assert kl["after"] < kl["before"]
    for node in done.program.nodes("linear"):
        if "weight" in info(node).formats:
            weight = done.program.weights[done.program.weight_of(node)]
            assert torch.equal(FORMAT.fake_quantize(weight), weight)


def test_the_program_given_keeps_its_weights(programs) -> None:
    before = {name: tensor.clone() for name, tensor in programs[1].weights.items()}
    _distill(programs, steps=6, learning_rate=1e-2)
    assert all(torch.equal(programs[1].weights[name], tensor) for name, tensor in before.items())


def test_tuning_that_does_not_help_changes_nothing_and_warns(programs) -> None:
    done = _distill(programs, steps=6, learning_rate=100.0)
    assert any("no weight was tuned" in warning for warning in done.record.warnings)
    assert all(done.program.weights[name] is tensor for name, tensor in programs[1].weights.items())


@pytest.fixture(scope="module")
def unrounded() -> tuple[Program, Program]:
    """The float program, and the same one with activations at 4 bits and weights that are still to be rounded."""
    rule = Rule(Selector(r".*_proj"), weight=FORMAT, input=FORMAT)
    start = trace(tiny("llama-tiny"))
    return start, PassManager().run(start, Pipeline([Annotate(rule=(rule,)), InsertFakeQuant()]).completed()).program


def test_weights_that_were_not_rounded_end_on_their_grids(unrounded) -> None:
    done = _distill(unrounded, steps=24, batch_size=8, learning_rate=1e-2)
    kl = done.record.details["held_out_kl"]
    assert kl["after"] < kl["before"]
    assert "weights-rounded" in done.program.facts
    for node in done.program.nodes("linear"):
        if "weight" in info(node).formats:
            weight = done.program.weights[done.program.weight_of(node)]
            assert torch.equal(FORMAT.fake_quantize(weight), weight)


def test_where_tuning_does_not_help_they_are_rounded_to_nearest(unrounded) -> None:
    done = _distill(unrounded, steps=6, learning_rate=100.0)
    assert any("no weight was tuned" in warning for warning in done.record.warnings)
    for node in done.program.nodes("linear"):
        if "weight" in info(node).formats:
            name = done.program.weight_of(node)
            assert torch.equal(done.program.weights[name], FORMAT.fake_quantize(unrounded[1].weights.master(name)))


def test_a_program_without_its_float_model_is_refused(programs) -> None:
    with pytest.raises(ValueError, match="PassManager"):
        apply(Distill(), programs[1], Context(tokens=lambda: TOKENS))


def test_weights_of_zeros_are_not_tuned_and_told_of(unrounded) -> None:
    start, program = unrounded[0], unrounded[1].copy()
    names = sorted(program.weight_of(n) for n in program.nodes("linear") if "weight" in info(n).formats)[:2]
    for name in names:
        program.weights.set(name, torch.zeros_like(program.weights[name]), by="test")
    done = _distill((start, program), steps=4, learning_rate=1e-2)
    (told,) = (warning for warning in done.record.warnings if "zeros" in warning)
    assert told.startswith(f"{names[0]} and 1 more stay as they are, all zeros: ")
    assert not any(done.program.weights[name].any() for name in names)
    assert not any("zeros" in warning for warning in _distill(unrounded, steps=1).record.warnings)


@pytest.mark.parametrize("scope", ["model", "layer"])
def test_no_state_is_taken_in_which_a_matrix_has_no_inverse(scope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    start = trace(tiny("llama-tiny"))
    rule = Rule(Selector(r".*_proj"), weight=FORMAT, input=FORMAT)
    passes = [Annotate(rule=(rule,)), TransformInputs(kind="wush", block=32), InsertFakeQuant()]
    ctx = Context(tokens=lambda: TOKENS, reference=start)
    program = PassManager().run(start, Pipeline(passes).completed(), ctx).program
    monkeypatch.setattr(torch.linalg, "cond", lambda matrix: torch.full(matrix.shape[:-2], 2e4))
    done = apply(
        Distill(scope=scope, steps=16, batch_size=8, learning_rate=1e-2, checks=1, tune=("transforms",)), program, ctx
    )
    assert any("tuned" in warning for warning in done.record.warnings)
    matrices = free_weights(program, ("transforms",), ALL)
    assert matrices and all(torch.equal(done.program.weights[name], program.weights[name]) for name in matrices)


@pytest.mark.parametrize(
    ("option", "value"),
    [("steps", 0), ("learning_rate", 0.0), ("held_out", 1.0), ("batch_size", 0), ("average", -1), ("accumulate", 5)],
)
def test_options_out_of_range_are_named(option: str, value: float) -> None:
    with pytest.raises(ValueError, match=option):
        Distill(**{option: value})


TIED = Annotate(
    rule=(
        Rule(Selector(r".*_proj"), weight=FORMAT, input=FORMAT),
        Rule(Selector(r".*embed_tokens|lm_head"), weight=FORMAT),
    )
)


@pytest.fixture(scope="module")
def tied() -> tuple[Program, Program]:
    """The float program, and one whose embedding and head share a weight that is to be rounded too."""
    start = trace(tiny("llama-tiny"))
    passes = [FuseNorm(keep_tied=True), TIED, InsertFakeQuant()]
    return start, PassManager().run(start, Pipeline(passes).completed()).program


def test_a_tied_weight_stays_one_tensor_and_ends_on_its_grid(tied) -> None:
    done = _distill(tied, steps=12, batch_size=8, learning_rate=1e-2, tune=("gains",)).program
    (embedding,), head = done.nodes("embedding"), [n for n in done.nodes("linear")][-1]
    name = done.weight_of(embedding)
    assert done.weights.canonical(done.weight_of(head)) == done.weights.canonical(name)
    assert torch.equal(FORMAT.fake_quantize(done.weights[name]), done.weights[name])
    assert bits_per_weight(done) < 5.5


def test_gains_are_tuned_only_where_they_are_asked_for(tied) -> None:
    gain = next(tied[1].weight_of(n) for n in tied[1].nodes("rms_norm") if n.args[1] is not None)
    options = {"steps": 12, "batch_size": 8, "learning_rate": 1e-2}
    assert torch.equal(_distill(tied, **options).program.weights[gain], tied[1].weights[gain])
    assert not torch.equal(_distill(tied, **options, tune=("gains",)).program.weights[gain], tied[1].weights[gain])


@pytest.mark.parametrize("kind", ["gains", "transforms", "embedding", "head"])
def test_everything_free_is_tuned_in_the_precision_of_the_model(kind: str) -> None:
    start = trace(tiny("llama-tiny", dtype=torch.bfloat16))
    rule = Rule(Selector(r".*_proj"), weight=FORMAT, input=FORMAT)
    passes = [Annotate(rule=(rule,)), TransformInputs(kind="wush", block=32), InsertFakeQuant()]
    ctx = Context(tokens=lambda: TOKENS, reference=start)
    program = PassManager().run(start, Pipeline(passes).completed(), ctx).program
    done = apply(Distill(steps=8, batch_size=8, learning_rate=1e-2, tune=(kind,)), program, ctx)
    free = free_weights(program, (kind,), ALL)
    assert free and done.record.details["tuned_beside_grids"] == len(free)
    changed = {name for name in free if not torch.equal(done.program.weights[name], program.weights[name])}
    assert changed == free or done.record.warnings


def test_layer_by_layer_the_logits_come_nearer_too(unrounded) -> None:
    _, quantized = unrounded
    done = _distill(unrounded, scope="layer", steps=40, batch_size=8, learning_rate=1e-2, checks=4)
    errors = done.record.details["held_out_error_by_layer"]
    assert len(errors) == 2 and all(error["after"] < error["before"] for error in errors)
    rounded = apply(RoundWeights(), quantized).program
    expected = tiny("llama-tiny")(TOKENS[:8]).logits
    kl = [divergence(emit(program)(TOKENS[:8]), expected) for program in (done.program, rounded)]
    assert kl[0] < kl[1]


def _errors(program: Program, start: Program) -> list[float]:
    """Of each layer's output, on quantized states, against the float layers', on the last 12 samples."""
    student, teacher = _cut(program), _cut(start)
    given, of_float = student.start(TOKENS[-12:]), teacher.start(TOKENS[-12:])
    found = []
    for index in range(len(student.layers)):
        student.share(index, given)
        teacher.share(index, of_float)
        with torch.no_grad():
            given, of_float = student.run(index, given), teacher.run(index, of_float)
        found.append(float(((given - of_float).square().sum(-1) / of_float.square().sum(-1)).mean()))
    return found


def test_a_layer_that_reads_quantized_states_is_held_against_the_float_layer_on_float_ones(unrounded) -> None:
    start, quantized = unrounded
    options = {"scope": "layer", "steps": 1, "batch_size": 8, "held_out": 0.25, "learning_rate": 1e-12}
    errors = _distill(unrounded, **options).record.details["held_out_error_by_layer"]
    found = _errors(apply(RoundWeights(), quantized).program, start)
    assert [error["before"] for error in errors] == pytest.approx(found, rel=1e-5)


def _cut(program: Program) -> LayeredModel:
    return LayeredModel(trainable(program, {}, torch.device("cpu"))[0], torch.device("cpu"))


def test_layers_that_share_keys_are_refused_where_they_are_cut(unrounded) -> None:
    """The keys of the first batch stood for those of all others."""
    shared = unrounded[0].copy()
    first, second = shared.nodes("attention")
    for place in (1, 2):
        second.update_arg(place, first.args[place])
    shared.graph.eliminate_dead_code()
    with pytest.raises(ValueError, match=r"layer 1 also reads .*, which is made of tokens"):
        _cut(shared)


def test_a_layer_that_reads_the_tokens_themselves_is_refused(unrounded) -> None:
    """What stands before the layers was kept of the first batch, whatever tokens the others have."""
    program = unrounded[0].copy()
    ids = next(n for n in program.graph.nodes if n.target == "input_ids")
    norm = next(n for n in program.nodes("linear") if path_of(n) == "model.layers.1.mlp.up_proj").args[0]
    total = norm.args[0]
    with program.graph.inserting_before(norm):
        even = program.graph.call_function(torch.ops.aten.remainder.Scalar, (ids, 2))
        column = program.graph.call_function(torch.ops.aten.unsqueeze.default, (even, -1))
        added = program.graph.call_function(torch.ops.aten.add.Tensor, (total, column))
    even.meta = {"val": ids.meta["val"]}
    column.meta = {"val": ids.meta["val"].unsqueeze(-1)}
    added.meta = {"val": total.meta["val"]}
    set_info(added, info(norm))
    norm.update_arg(0, added)
    with pytest.raises(ValueError, match=r"layer 1 also reads unsqueeze.*, which is made of tokens"):
        _cut(program)


def test_the_mask_that_layers_share_is_made_by_part_of_the_first_and_is_of_no_tokens() -> None:
    program = PassManager().run(trace(tiny("mistral-tiny")), Pipeline([]).completed()).program
    model, other = _cut(program), _cut(program)
    (mask,) = model.layers[0].shared.outputs
    assert mask.target is attention_bias and len(model.layers[0].shared.nodes) < len(model.layers[0].stage.nodes) / 2
    states = [one.start(TOKENS[at : at + 4]) for one, at in ((other, 0), (model, 4))]
    other.start(TOKENS[4:8])
    for index in range(2):
        for one, given in zip((other, model), states, strict=True):
            one.share(index, given)
        found, expected = (one.run(index, states[1]) for one in (other, model))
        assert torch.equal(found, expected)
        states = [other.run(index, states[0]), expected]


@pytest.mark.parametrize("named_twice", [False, True])
def test_a_weight_of_two_layers_is_in_both_what_it_is_in_the_end(unrounded, named_twice: bool) -> None:
    """The second layer read it as it was before the first was tuned, or tuned it again for itself."""
    start, quantized = (program.copy() for program in unrounded)
    for program in (start, quantized):
        first, second = (
            next(n for n in program.nodes("linear") if path_of(n) == f"model.layers.{i}.mlp.up_proj") for i in (0, 1)
        )
        weight = spec(first).node_of("weight")
        if named_twice:
            weight = Rewriter(program, "test").weight(str(weight.target), second)
        second.update_arg(1, weight)
        program.graph.eliminate_dead_code()
    options = {"scope": "layer", "steps": 24, "batch_size": 8, "held_out": 0.25, "learning_rate": 1e-2}
    done = _distill((start, quantized), **options)
    errors = done.record.details["held_out_error_by_layer"]
    assert all(error["best_step"] for error in errors)
    assert [error["after"] for error in errors] == pytest.approx(_errors(done.program, start), rel=1e-5)


def test_layer_by_layer_with_a_rotation_whose_matrix_lowering_makes(unrounded) -> None:
    start, quantized = unrounded
    rotated = apply(RotateQk(), quantized).program
    done = _distill((start, rotated), scope="layer", steps=2, batch_size=8)
    assert len(done.record.details["held_out_error_by_layer"]) == 2


def test_a_killed_run_by_layers_resumed_ends_with_the_same_bytes(unrounded, tmp_path: Path) -> None:
    start, quantized = unrounded
    pass_ = Distill(scope="layer", steps=6, batch_size=8, learning_rate=1e-2, checkpoint_every=2, checks=2)

    def kill(items, what, *_):
        for item in items:
            if what == "distill layer 1" and item == 3:
                raise _Killed
            yield item

    def run(folder: str, **options) -> Program:
        ctx = Context(tokens=lambda: TOKENS, reference=start, cache=tmp_path / folder, **options)
        return apply(pass_, quantized, ctx).program

    with pytest.raises(_Killed):
        run("killed", progress=kill)
    assert _bytes(run("killed")) == _bytes(run("whole"))


def test_running_layers_again_for_their_gradients_changes_nothing(unrounded) -> None:
    options = {"steps": 4, "batch_size": 8, "learning_rate": 1e-2}
    plain, again = (_distill(unrounded, **options, recompute=flag) for flag in (False, True))
    assert _bytes(plain.program) == _bytes(again.program)


@pytest.mark.parametrize("steps", [2, 12])
def test_states_that_are_kept_change_no_bit(unrounded, monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Of 45 samples, 2 steps of 8 see few, 12 steps all."""
    options = {"steps": steps, "batch_size": 8, "learning_rate": 1e-2}
    counted: list[int] = []
    whole = Staged.__call__

    def call(self, ids):
        counted.append(len(ids))
        return whole(self, ids)

    monkeypatch.setattr(Staged, "__call__", call)
    kept = _distill(unrounded, **options)
    assert len(counted) == (steps if steps == 12 else 2 * steps)
    monkeypatch.setattr(teacher, "_CPU_BYTES", 0)
    counted.clear()
    again = _distill(unrounded, **options)
    assert len(counted) > 2 * steps
    assert _bytes(kept.program) == _bytes(again.program)


def test_compiled_layers_share_one_compilation_and_have_the_same_gradients(
    unrounded, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    compile_ = torch.compile
    monkeypatch.setattr(distill, "_COMPILED", {"cpu"})
    monkeypatch.setattr(staged, "_BACKEND", "aot_eager")
    monkeypatch.setattr(torch, "compile", lambda module, **given: asked.append(module) or compile_(module, **given))
    options = {"steps": 24, "batch_size": 8, "learning_rate": 1e-2}
    plain, compiled = (_distill(unrounded, **options, compile=flag) for flag in (False, True))
    # The first layer also makes what both read.
    assert len(asked) == 2 and not compiled.record.warnings
    assert _bytes(plain.program) == _bytes(compiled.program)


def test_a_compiler_that_fails_is_told_of_and_not_used(unrounded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distill, "_COMPILED", {"cpu"})
    monkeypatch.setattr(staged, "_BACKEND", lambda *_: (_ for _ in ()).throw(OSError("no compiler here")))
    done = _distill(unrounded, steps=24, batch_size=8, learning_rate=1e-2, compile=True)
    assert any("torch.compile" in warning and "no compiler here" in warning for warning in done.record.warnings)
    assert done.record.details["best_step"] > 0


def test_only_repeatable_kernels_where_that_is_asked_for(unrounded, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    monkeypatch.setattr(Staged, "logits", lambda *_: seen.append(torch.are_deterministic_algorithms_enabled()) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        _distill(unrounded, steps=1, deterministic=True)
    assert seen == [True] and not torch.are_deterministic_algorithms_enabled()
    with (
        pytest.raises(ValueError, match="CUBLAS_WORKSPACE_CONFIG"),
        monkeypatch.context() as patch,
        deterministic(torch.device("cuda")),
    ):
        patch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"compile": True}, {"deterministic": True}),
        ({"compile": True}, {"scope": "layer"}),
        ({"recompute": True}, {"scope": "layer"}),
        ({"tune": ("head",)}, {"scope": "layer"}),
        ({"tune": ("gains", "embedding")}, {"scope": "layer"}),
    ],
)
def test_what_does_not_go_together_is_named(first: dict, second: dict) -> None:
    (name,) = first
    Distill(**first)
    with pytest.raises(ValueError, match=name):
        Distill(**first, **second)


@pytest.mark.cuda
def test_on_a_gpu_a_deterministic_run_resumed_ends_with_the_same_bytes(unrounded, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    start, quantized = unrounded
    options = {"steps": 12, "batch_size": 8, "learning_rate": 1e-2, "checkpoint_every": 4, "checks": 3}

    def kill(items, what, *_):
        for item in items:
            if what == "distill" and item == 9:
                raise _Killed
            yield item

    def run(folder: str, **others) -> Program:
        given = {
            "tokens": lambda: TOKENS,
            "reference": start,
            "cache": tmp_path / folder,
            "device": torch.device("cuda"),
        }
        return apply(Distill(**options, deterministic=True), quantized, Context(**given, **others)).program

    whole = run("whole")
    with pytest.raises(_Killed):
        run("killed", progress=kill)
    assert _bytes(run("killed")) == _bytes(whole)


def test_a_batch_in_parts_has_the_gradient_of_the_whole(unrounded) -> None:
    options = {"steps": 4, "batch_size": 8, "learning_rate": 1e-2}
    whole, parts = (_distill(unrounded, **options, accumulate=count) for count in (1, 4))
    for name, tensor in whole.program.weights.items():
        close = (parts.program.weights[name] - tensor).abs() < 1e-6
        assert close.float().mean() > 0.99  # a rounding may fall to the other side


def test_parts_of_a_batch_have_one_size_when_states_are_compared_too(
    unrounded, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: set[int] = set()
    of = distill.divergence
    monkeypatch.setattr(distill, "divergence", lambda a, e: sizes.add(len(a)) or of(a, e))
    _distill(unrounded, steps=2, batch_size=8, accumulate=3, checks=1, held_out=0.25)
    assert sizes == {2}


def test_a_checkpoint_is_of_its_formats_its_held_out_samples_and_its_float_model(unrounded, tmp_path: Path) -> None:
    start, quantized = unrounded
    pass_ = Distill(steps=1, checks=1, checkpoint_every=1)

    def run(program: Program = quantized, tokens: torch.Tensor = TOKENS, reference: Program = start) -> int:
        apply(pass_, program, Context(tokens=lambda: tokens, reference=reference, cache=tmp_path))
        return len({file.stem.split("-")[1] for file in tmp_path.glob("distill-*.safetensors")})

    rule = Rule(Selector(r".*_proj"), weight=parse("mxfp4_e2m1@32"), input=FORMAT)
    other = PassManager().run(start, Pipeline([Annotate(rule=(rule,)), InsertFakeQuant()]).completed()).program
    assert _bytes(other) == _bytes(quantized)
    changed = TOKENS.clone()
    changed[-1, -1] += 1
    moved = trace(tiny("llama-tiny", seed=1))
    assert [run(), run(), run(other), run(tokens=changed), run(reference=moved)] == [1, 1, 2, 3, 4]


def test_the_state_that_is_kept_is_the_best_of_those_looked_at(unrounded) -> None:
    details = _distill(unrounded, steps=24, batch_size=8, learning_rate=0.3, checks=6).record.details
    looked = {int(step): loss for step, loss in details["held_out_by_step"].items()}
    assert sorted(looked) == [0, 4, 8, 12, 16, 20, 24]
    assert details["held_out_kl"]["after"] == min(looked.values()) == looked[details["best_step"]]


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """A learning rate that does not fall: states swing around their mean to the end."""
    monkeypatch.setattr(Distillation, "_share", lambda *_: 1.0)


def test_an_average_is_taken_where_it_is_nearer_than_any_state(unrounded, steady) -> None:
    options = {"steps": 24, "batch_size": 8, "learning_rate": 1e-2, "checks": 2}
    plain, done = (_distill(unrounded, **options, average=reach) for reach in (0, 12))
    details = done.record.details
    assert details["held_out_by_step"] == plain.record.details["held_out_by_step"]
    assert sorted(details["averaged_by_step"]) == ["12", "24"]
    assert details["best_is_average"] and not plain.record.details["best_is_average"]
    after = details["held_out_kl"]["after"]
    assert after == details["averaged_by_step"][str(details["best_step"])] < min(details["held_out_by_step"].values())
    expected = tiny("llama-tiny")(TOKENS[-3:]).logits
    with torch.no_grad():
        found = divergence(emit(done.program)(TOKENS[-3:]), expected)
    assert float(found) == pytest.approx(after, rel=1e-4)


def test_an_average_over_one_step_is_the_state_itself(unrounded) -> None:
    options = {"steps": 12, "batch_size": 8, "learning_rate": 1e-2, "checks": 3}
    plain, done = (_distill(unrounded, **options, average=reach) for reach in (0, 1))
    details = done.record.details
    assert details["averaged_by_step"] == {at: kl for at, kl in details["held_out_by_step"].items() if at != "0"}
    assert not details["best_is_average"] and _bytes(done.program) == _bytes(plain.program)


@pytest.mark.cuda
def test_on_a_gpu_layers_come_as_near_as_on_a_cpu_and_leave_its_memory(unrounded) -> None:
    start, quantized = unrounded
    options = {"scope": "layer", "steps": 24, "batch_size": 8, "learning_rate": 1e-2, "checks": 3}

    def held() -> int:
        gc.collect()
        return torch.cuda.memory_allocated()

    torch._C._cuda_clearCublasWorkspaces()
    before = held()
    ctx = Context(tokens=lambda: TOKENS, reference=start, device=torch.device("cuda"))
    found = apply(Distill(**options), quantized, ctx).record.details["held_out_error_by_layer"]
    once = held()
    apply(Distill(**options), quantized, ctx)
    # cuBLAS has a workspace for each stream: layers and runs must share theirs.
    assert held() == once
    torch._C._cuda_clearCublasWorkspaces()
    assert held() - before < 32 << 20
    expected = _distill(unrounded, **options).record.details["held_out_error_by_layer"]
    for mine, of_cpu in zip(found, expected, strict=True):
        assert mine["before"] == pytest.approx(of_cpu["before"], rel=0.05)
        assert mine["after"] == pytest.approx(of_cpu["after"], rel=0.1)


class _Killed(Exception):
    pass


@pytest.mark.parametrize("average", [0, 5])
def test_a_killed_run_resumed_ends_with_the_same_bytes(unrounded, tmp_path: Path, steady, average: int) -> None:
    start, quantized = unrounded
    pass_ = Distill(steps=12, batch_size=8, learning_rate=1e-2, checkpoint_every=4, checks=3, average=average)

    def kill(items, what, *_):
        for item in items:
            if what == "distill" and item == 9:
                raise _Killed
            yield item

    def run(folder: Path, **options):
        ctx = Context(tokens=lambda: TOKENS, reference=start, cache=tmp_path / folder, **options)
        return apply(pass_, quantized, ctx)

    whole = run(Path("whole"))
    with pytest.raises(_Killed):
        run(Path("killed"), progress=kill)
    assert len(list((tmp_path / "killed").glob("distill-*.safetensors"))) == 1
    steps: list[int] = []
    resumed = run(Path("killed"), progress=lambda items, *_: (steps.append(i) or i for i in items))
    assert steps[-4:] == [8, 9, 10, 11]
    assert resumed.record.details == whole.record.details
    assert whole.record.details["best_is_average"] == bool(average)
    assert _bytes(resumed.program) == _bytes(whole.program)


def test_what_stays_of_a_run_that_ended_is_its_result_alone_and_spares_the_next_one(unrounded, tmp_path: Path) -> None:
    start, quantized = unrounded
    pass_ = Distill(steps=2, batch_size=8, checkpoint_every=1, average=2)
    steps: list[int] = []

    def noted(items, what, *_):
        for item in items:
            steps.extend([item] if what == "distill" else [])
            yield item

    def run() -> Program:
        ctx = Context(
            tokens=lambda: TOKENS,
            reference=start,
            cache=tmp_path,
            progress=noted,
        )
        return apply(pass_, quantized, ctx).program

    first = run()
    (file,) = tmp_path.glob("distill-*.safetensors")
    assert {name.partition("/")[0] for name in read_tensors(file)[0]} == {"best"}
    assert steps == [0, 1] and _bytes(run()) == _bytes(first) and steps == [0, 1]


@pytest.mark.parametrize("damage", [lambda data: data[:-100], lambda data: data[:-9] + b"\x00" + data[-8:]])
def test_a_damaged_checkpoint_is_named(damage, unrounded, tmp_path: Path) -> None:
    start, quantized = unrounded
    ctx = Context(tokens=lambda: TOKENS, reference=start, cache=tmp_path)
    pass_ = Distill(steps=2, checkpoint_every=1)
    apply(pass_, quantized, ctx)
    (file,) = tmp_path.glob("distill-*.safetensors")
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=r"distill-.*cannot be read.*remove it"):
        apply(pass_, quantized, ctx)


def _bytes(program: Program) -> dict[str, str]:
    return {name: program.weights.hash(name) for name in program.weights}


def test_a_model_that_does_not_fit_is_refused_with_both_figures_and_by_layer_it_runs(programs, monkeypatch) -> None:
    _, quantized = programs
    grids = sum(quantized.weights[quantized.weight_of(n)].numel() for n in quantized.nodes("linear") if info(n).formats)
    assert Distill().bytes_of(100) == 1600 and Distill(average=4).bytes_of(100) == 2000
    assert Distill().bytes_of(100, 4) == 800 + 400 + 200
    needed = Distill().bytes_of(grids)  # the models are on the CPU already
    monkeypatch.setattr(distill, "free_bytes", lambda device: needed / distill.SHARE - 2)
    with pytest.raises(ValueError, match=r"scope = 'model' takes .* GB on cpu .* not sharded.*scope = 'layer'"):
        _distill(programs, steps=1)
    assert _distill(programs, steps=1, scope="layer").record.details["held_out_error_by_layer"]
    monkeypatch.setattr(distill, "free_bytes", lambda device: needed / distill.SHARE + 2)
    assert _distill(programs, steps=1).record.details["held_out_kl"]
