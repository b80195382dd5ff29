"""``distill``: tuned weights on their grids, nearer to the float model, and nothing else touched."""

from __future__ import annotations

import pytest
import torch

from mxfx.config import Pipeline
from mxfx.formats import parse
from mxfx.graph.node import info
from mxfx.graph.program import Program
from mxfx.graph.tiny import tiny
from mxfx.graph.trace import trace
from mxfx.passes import Annotate, Distill, InsertFakeQuant, RoundWeights, Rule
from mxfx.pipeline.manager import PassManager
from mxfx.rewrite import Context, Selector, apply

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


@pytest.mark.parametrize(
    ("option", "value"), [("steps", 0), ("learning_rate", 0.0), ("held_out", 1.0), ("batch_size", 0)]
)
def test_options_out_of_range_are_named(option: str, value: float) -> None:
    with pytest.raises(ValueError, match=option):
        Distill(**{option: value})
