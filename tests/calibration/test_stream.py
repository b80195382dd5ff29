"""A stream runs the program once, layer by layer, and measures what each linear really reads."""

from __future__ import annotations

import weakref
from functools import cache

import pytest
import torch
from torch import Tensor, fx

from mxfx.calibration.runner import DeviceWeights, Runner
from mxfx.calibration.stages import cut
from mxfx.calibration.statistics import Gram, StaleStatistics
from mxfx.calibration.stream import StreamOptions, stream_layers, without_quantizers
from mxfx.formats import parse
from mxfx.graph import transfers
from mxfx.graph.execute import execute
from mxfx.graph.node import layer_of, path_of
from mxfx.graph.program import Program
from mxfx.graph.tiny import tiny
from mxfx.graph.trace import trace
from mxfx.graph.transfers import HostBuffers
from mxfx.passes import Annotate, InsertFakeQuant, Lower, RaiseAttention, RaiseNorm, RaiseRope, Rule
from mxfx.rewrite import Context, Rewriter, Selector, apply

_TOKENS = torch.randint(3, 128, (5, 12), generator=torch.Generator().manual_seed(3))


@cache
def _raised(family: str = "llama-tiny", quantized: bool = False) -> Program:
    program = trace(tiny(family, layers=3))
    fmt = parse("mxint4@32")
    rule = Rule(Selector(r".*proj"), weight=fmt, input=fmt)
    passes = [
        RaiseNorm(),
        RaiseRope(),
        RaiseAttention(),
        *([Annotate((rule,)), InsertFakeQuant()] if quantized else []),
    ]
    for pass_ in passes:
        program = apply(pass_, program).program
    return program


def _rewriter(program: Program) -> Rewriter:
    return Rewriter(program.copy(), "test")


def _projections(program: Program) -> list[fx.Node]:
    return [node for node in program.nodes("linear") if path_of(node).endswith("proj")]


def _inputs(program: Program, tokens: Tensor = _TOKENS) -> dict[str, Tensor]:
    """What each projection reads when the whole program runs at once."""
    read = {node.args[0]: node for node in _projections(program)}
    found: dict[str, Tensor] = {}

    def observe(node: fx.Node, value: object) -> object:
        if node in read:
            found[node.name] = value  # type: ignore[assignment]
        return value

    execute(program, tokens, observe=observe)
    return {node.name: found[node.args[0].name] for node in _projections(program)}  # type: ignore[union-attr]


def _gram(x: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1]).double()
    return rows.mT @ rows


def _close(measured: Tensor, expected: Tensor) -> bool:
    return float((measured.double() - expected.double()).norm() / expected.norm()) < 1e-5


def _measure(rw: Rewriter, options: StreamOptions | None = None, tokens: Tensor = _TOKENS) -> dict[str, Tensor]:
    found = {}
    for layer in stream_layers(rw, Context(), _projections(rw.program), tokens, options):
        for group in layer.groups():
            for node in group.linears:
                found[node.name] = group.statistics.hessian(node.args[0], rw.weights.hash)  # type: ignore[arg-type]
    return found


_STREAMED = ["llama-tiny", "gemma3-tiny", "phi3-tiny", "olmo2-tiny"]


@pytest.mark.parametrize("family", _STREAMED)
def test_statistics_are_those_of_the_whole_program(family: str) -> None:
    rw = _rewriter(_raised(family))
    measured = _measure(rw, StreamOptions(batch_size=2))
    expected = _inputs(rw.program)
    assert measured.keys() == expected.keys()
    assert all(_close(measured[name], _gram(expected[name])) for name in expected)


def test_quantized_activations_are_what_the_gemm_reads() -> None:
    rw = _rewriter(_raised(quantized=True))
    measured, expected = _measure(rw), _inputs(rw.program)
    assert all(_close(measured[name], _gram(expected[name])) for name in expected)


def test_linears_that_read_one_node_share_one_hessian() -> None:
    rw = _rewriter(_raised())
    groups = [
        [path_of(node).split(".")[-1] for node in group.linears]
        for layer in stream_layers(rw, Context(), _projections(rw.program), _TOKENS)
        for group in layer.groups()
    ]
    assert groups == 3 * [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5])
def test_hessians_do_not_depend_on_batching(batch_size: int) -> None:
    rw = _rewriter(_raised())
    whole, parts = _measure(rw, StreamOptions(batch_size=5)), _measure(rw, StreamOptions(batch_size=batch_size))
    assert all(_close(parts[name], whole[name]) for name in whole)


@pytest.mark.parametrize("placement", ["cpu", "disk"])
def test_where_activations_wait_changes_nothing(placement: str) -> None:
    rw = _rewriter(_raised(quantized=True))
    options = StreamOptions(batch_size=2, activations=placement)  # type: ignore[arg-type]
    here, there = _measure(rw, StreamOptions(batch_size=2)), _measure(rw, options)
    assert all(torch.equal(there[name], here[name]) for name in here)


def test_memory_that_cannot_be_pinned_is_said_once_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty

    def refuses(*size: object, pin_memory: bool = False, **rest: object) -> Tensor:
        if pin_memory:
            raise RuntimeError("no page is left\nat allocate")
        return empty(*size, **rest)  # type: ignore[call-overload,no-any-return]

    plain = _measure(_rewriter(_raised()), StreamOptions(batch_size=2))
    monkeypatch.setattr(transfers, "HostBuffers", lambda pinned: HostBuffers(True))
    monkeypatch.setattr(torch, "empty", refuses)
    rw = _rewriter(_raised())
    found = _measure(rw, StreamOptions(batch_size=2, activations="disk"))
    assert rw.record.warnings == ["copies wait for the host: it pins no more memory for them (no page is left)"]
    assert all(torch.equal(found[name], plain[name]) for name in plain)


def test_nothing_waits_on_the_device_while_groups_are_solved(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []
    settle, advance = Runner.settle, Runner.advance

    def settled(self: Runner) -> None:
        happened.append("settled")
        settle(self)

    def ran(self: Runner, *given: object) -> None:
        happened.append("ran")
        advance(self, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(Runner, "settle", settled)
    monkeypatch.setattr(Runner, "advance", ran)
    rw = _rewriter(_raised())
    for layer in stream_layers(rw, Context(), _projections(rw.program), _TOKENS, StreamOptions(activations="cpu")):
        for _ in layer.groups():
            happened.append("solved")
    assert "ran,solved" not in (order := ",".join(happened)) and "ran,settled,solved" in order


def test_what_leaves_is_held_until_it_has_left() -> None:
    waited: list[str] = []

    class Event:
        def synchronize(self) -> None:
            waited.append("event")

    moving = transfers.Transfers(torch.device("cpu"))
    tensor = torch.ones(3)
    moving._leaving[-1].append((Event(), tensor))  # type: ignore[arg-type]
    gone = weakref.ref(tensor)
    del tensor
    moving.end_of_batch()
    assert gone() is not None and not waited
    moving.settle()
    assert gone() is None and waited == ["event"]


def test_a_weight_that_was_just_stored_is_not_brought_back() -> None:
    rw = _rewriter(_raised())
    program = rw.program
    name, plain = list(program.weights)[:2]
    asked: list[str] = []

    def weight(name: str) -> Tensor:
        asked.append(name)
        return program.weights[name]

    moving = transfers.Transfers(torch.device("cpu"))
    weights = DeviceWeights(program, weight, program.weights.behind, moving)
    weights.prefetch([name])
    program.weights.set(name, program.weights[name] * 2, "test")
    weights.keep(name, program.weights[name])
    weights.prefetch([name, plain])
    assert asked == [name, plain] and torch.equal(weights.running(name), program.weights[name])
    program.weights.set(name, program.weights[name] * 2, "test")
    weights.prefetch([name])
    assert asked == [name, plain, name] and torch.equal(weights.running(name), program.weights[name])


def test_every_group_sees_the_rewrites_of_all_groups_before_it() -> None:
    rw = _rewriter(_raised())
    for layer in stream_layers(rw, Context(), _projections(rw.program), _TOKENS):
        for group in layer.groups():
            expected = _inputs(rw.program)[group.linears[0].name]
            assert _close(group.statistics.hessian(group.source, rw.weights.hash), _gram(expected))
            for node in group.linears:
                name = rw.program.weight_of(node)
                rw.set_weight(name, rw.weights[name] * 0.5)


def test_layers_that_nobody_measures_run_with_their_rewritten_weights() -> None:
    """What a resumed run does: weights are set, no statistics are taken, the stream goes on from there."""
    rw = _rewriter(_raised())
    for layer in stream_layers(rw, Context(), _projections(rw.program), _TOKENS):
        if layer.index == 2:
            last = next(layer.groups())
            break
        for node in layer.targets:
            name = rw.program.weight_of(node)
            rw.set_weight(name, rw.weights[name] * 0.5)
    expected = _inputs(rw.program)[last.linears[0].name]
    assert _close(last.statistics.hessian(last.source, rw.weights.hash), _gram(expected))


def test_no_stage_runs_twice_and_none_before_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    real = torch.nn.functional.scaled_dot_product_attention

    def counted(query: Tensor, *args: object, **kwargs: object) -> Tensor:
        # The estimate runs every stage without data.
        if query.device.type != "meta":
            calls.append(1)
        return real(query, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    rw = _rewriter(_raised())
    lowering = len(calls)
    _measure(rw, StreamOptions(batch_size=5))
    assert len(calls) - lowering == 3, "one attention a layer"
    for _ in stream_layers(rw, Context(), _projections(rw.program), _TOKENS):
        pass
    assert len(calls) - lowering == 3, "nobody asked for a statistic"


def test_the_cross_moment_is_that_of_quantized_and_float_inputs() -> None:
    rw = _rewriter(_raised(quantized=True))
    plain = _inputs(without_quantizers(rw.program))
    name = "model.layers.0.self_attn.o_proj.weight"
    for layer in stream_layers(rw, Context(), _projections(rw.program), _TOKENS, StreamOptions(reference=True)):
        for group in layer.groups():
            x = _inputs(rw.program)[group.linears[0].name].reshape(-1, group.source.meta["val"].shape[-1])
            y = plain[group.linears[0].name].reshape(x.shape)
            cross = group.statistics.cross(group.source, rw.weights.hash)
            assert _close(cross, x.double().mT @ y.double())
            if name in [rw.program.weight_of(node) for node in group.linears]:
                rw.set_weight(name, rw.weights[name] * 0.7)


def test_tokens_count_by_their_importance_in_both_moments() -> None:
    rw = _rewriter(_raised(quantized=True))
    plain, read = _inputs(without_quantizers(rw.program)), _inputs(rw.program)
    generator = torch.Generator().manual_seed(5)
    names = [node.name for node in _projections(rw.program)]
    shared = torch.rand(_TOKENS.shape, generator=generator)
    options = StreamOptions(batch_size=2, reference=True, importance=dict.fromkeys(names, shared))
    for layer in stream_layers(rw, Context(), _projections(rw.program), _TOKENS, options):
        for group in layer.groups():
            name = group.linears[0].name
            x, y = (of[name].reshape(_TOKENS.numel(), -1).double() for of in (read, plain))
            weighted = x * shared.double().reshape(-1, 1)
            assert _close(group.statistics.hessian(group.source, rw.weights.hash), weighted.mT @ x)
            assert _close(group.statistics.cross(group.source, rw.weights.hash), weighted.mT @ y)


# Wrong or stale statistics cannot reach a solver.


def _first_group(rw: Rewriter, layer_index: int = 1):
    for layer in stream_layers(rw, Context(), _projections(rw.program), _TOKENS):
        if layer.index == layer_index:
            return next(layer.groups())
    raise AssertionError("no such layer")


def test_statistics_go_stale_when_a_weight_upstream_changes() -> None:
    rw = _rewriter(_raised())
    group = _first_group(rw)
    rw.set_weight("model.layers.0.mlp.up_proj.weight", rw.weights["model.layers.0.mlp.up_proj.weight"] + 1)
    with pytest.raises(StaleStatistics, match="upstream"):
        group.statistics.hessian(group.source, rw.weights.hash)


def test_statistics_stay_good_when_a_weight_downstream_changes() -> None:
    rw = _rewriter(_raised())
    group = _first_group(rw)
    rw.set_weight("model.layers.1.mlp.up_proj.weight", rw.weights["model.layers.1.mlp.up_proj.weight"] + 1)
    assert group.statistics.hessian(group.source, rw.weights.hash) is not None


def test_statistics_of_another_tensor_are_refused() -> None:
    rw = _rewriter(_raised())
    group = _first_group(rw)
    other = next(node for node in rw.program.nodes("linear") if path_of(node) == "model.layers.1.mlp.down_proj")
    with pytest.raises(StaleStatistics):
        group.statistics.hessian(other.args[0], rw.weights.hash)  # type: ignore[arg-type]


def test_statistics_go_stale_when_the_graph_upstream_changes() -> None:
    rw = _rewriter(_raised())
    group = _first_group(rw)
    silu = next(rw.program.nodes("silu"))
    rw.replace(silu, rw.call(torch.ops.aten.relu.default, silu.args[0], like=silu))
    rw.erase(silu)
    with pytest.raises(StaleStatistics):
        group.statistics.hessian(group.source, rw.weights.hash)


def test_a_weight_changed_behind_the_back_of_a_stage_that_ran_is_noticed() -> None:
    """The stream ran layer 0 before the change: its activations are of another model than the program is now."""
    rw = _rewriter(_raised())
    name = "model.layers.0.mlp.up_proj.weight"
    layers = stream_layers(rw, Context(), _projections(rw.program), _TOKENS)
    next(layers)
    next(next(layers).groups())
    rw.set_weight(name, rw.weights[name] + 1)
    group = next(next(layers).groups())
    with pytest.raises(StaleStatistics):
        group.statistics.hessian(group.source, rw.weights.hash)


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": _TOKENS.flip(0)},
        {"tokens": _TOKENS[:, :11]},
        {"options": StreamOptions(batch_size=2)},
        {"options": StreamOptions(dtype=torch.float64)},
    ],
    ids=["order of samples", "length", "batching", "dtype"],
)
def test_keys_tell_data_and_options_apart(change: dict) -> None:
    def key(tokens: Tensor = _TOKENS, options: StreamOptions | None = None) -> str:
        rw = _rewriter(_raised())
        layers = stream_layers(rw, Context(), _projections(rw.program), tokens, options)
        return next(next(layers).groups()).statistics.key

    assert key() == key()
    assert key(**change) != key()


def test_a_layer_of_a_stream_that_was_closed_says_so() -> None:
    rw = _rewriter(_raised())
    layers = stream_layers(rw, Context(), _projections(rw.program), _TOKENS)
    layer = next(layers)
    layers.close()  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="closed"):
        next(layer.groups())


def test_targets_that_are_no_linears_of_the_program_are_refused() -> None:
    rw = _rewriter(_raised())
    with pytest.raises(ValueError, match="is no linear of the program"):
        next(stream_layers(rw, Context(), [next(rw.program.nodes("rms_norm"))], _TOKENS))


@pytest.mark.parametrize("tokens", [_TOKENS[0], _TOKENS.float(), _TOKENS[:0]], ids=["one axis", "float", "empty"])
def test_tokens_of_another_shape_are_refused(tokens: Tensor) -> None:
    rw = _rewriter(_raised())
    with pytest.raises(ValueError, match="int64"):
        next(stream_layers(rw, Context(), _projections(rw.program), tokens))


# Stages.


@pytest.mark.parametrize("family", _STREAMED)
def test_no_stage_holds_weights_of_two_layers(family: str) -> None:
    program = apply(Lower(), _raised(family)).program
    for stage in cut(program.graph):
        layers = {layer_of(node) for node in stage.nodes if any(s.op == "get_attr" for s in node.all_input_nodes)}
        assert len(layers) <= 1, f"{layers} in one stage"


def test_gram_sums_only_what_it_was_given() -> None:
    x = torch.randn(100, 300, generator=torch.Generator().manual_seed(0))
    gram = Gram(300, torch.device("cpu"), torch.float64)
    gram.add(x[:30])
    gram.add(x[30:].view(7, 10, 300))
    assert gram.rows == 100
    assert torch.allclose(gram.value(), _gram(x), rtol=1e-12)
    assert torch.equal(gram.value(), gram.value().mT)
