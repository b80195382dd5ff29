"""A replay computes what the program before it did not, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from mxfx.graph import replay as module
from mxfx.graph.execute import execute
from mxfx.graph.replay import Replay
from mxfx.passes.raise_norm import RaiseNorm
from mxfx.rewrite import apply
from mxfx.rewrite.rewriter import Rewriter

IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
WEIGHT = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the nodes that were computed, in order."""
    names: list[str] = []

    def call(program, node: fx.Node, *rest, **options):
        if node.op == "call_function":
            names.append(node.name)
        return real(program, node, *rest, **options)

    real = module.call
    monkeypatch.setattr(module, "call", call)
    return names


def same_names(program) -> dict[str, str]:
    return {node.name: node.name for node in program.graph.nodes}


def test_a_program_is_computed_once(program, computed):
    traced = program("llama-tiny", "traced")
    replay = Replay()
    first = replay.run(traced, IDS)
    assert torch.equal(first, execute(traced, IDS)) and len(computed) == len(set(computed)) > 50
    computed.clear()
    assert replay.run(traced.copy(), IDS) is first
    assert not computed


def test_what_reads_a_changed_weight_is_computed_and_what_stands_before_is_not(program, computed):
    traced = program("llama-tiny", "raised")
    replay = Replay()
    replay.run(traced, IDS)
    rw = Rewriter(traced.copy(), "test")
    rw.set_weight(WEIGHT, rw.weights.master(WEIGHT) * 1.5)
    computed.clear()
    logits = replay.run(rw.program, IDS, twins=same_names(rw.program))
    assert torch.equal(logits, execute(rw.program, IDS))
    order = [node.name for node in rw.program.graph.nodes if node.op == "call_function"]
    first = next(n.name for n in rw.program.nodes("linear") if n.args[1].target == WEIGHT)
    assert computed[0] == first and computed == order[order.index(first) :]


def test_readers_of_a_value_that_stayed_the_same_are_not_computed(program, computed):
    """raise-norm writes other ops for the same bits: the linears that read them are known."""
    traced = program("llama-tiny", "traced")
    replay = Replay()
    replay.run(traced, IDS)
    raised = apply(RaiseNorm(), traced).program
    norms = [node.name for node in raised.nodes("rms_norm")]
    # A norm stands for the last op of its tree, which the linears read.
    old = {node.name: node for node in traced.graph.nodes}
    twins = same_names(raised)
    for norm in raised.nodes("rms_norm"):
        reader = next(iter(norm.users))
        twins[norm.name] = old[reader.name].args[reader.args.index(norm)].name
    computed.clear()
    assert torch.equal(replay.run(raised, IDS, twins=twins), execute(raised, IDS))
    assert computed == norms


def test_a_weight_that_was_written_in_place_is_another_one(program, computed):
    traced = program("llama-tiny", "raised")
    own = traced.copy()
    own.weights = own.weights.cast(torch.float64).cast(traced.dtype)
    replay = Replay()
    before = replay.run(own, IDS)
    own.weights[WEIGHT].mul_(1.5)
    after = replay.run(own, IDS)
    assert not torch.equal(before, after) and torch.equal(after, execute(own, IDS))


def test_the_precision_of_a_program_is_part_of_every_call(program):
    traced = program("llama-tiny", "raised")
    replay = Replay()
    replay.run(traced, IDS)
    other = traced.copy()
    other.dtype = torch.bfloat16
    assert torch.equal(replay.run(other, IDS), execute(other, IDS))


def test_values_beyond_the_limit_are_computed_again(program, computed):
    traced = program("llama-tiny", "raised")
    replay = Replay(limit=5000)
    first = replay.run(traced, IDS)
    whole = len(computed)
    computed.clear()
    assert torch.equal(replay.run(traced, IDS), first)
    assert 0 < len(computed) < whole


def test_a_twin_that_is_laid_out_otherwise_is_no_twin(program):
    """Equal numbers in another order in memory may be summed in another order by what reads them."""
    x = torch.arange(6.0).reshape(2, 3)
    assert module._same_bits(x, x.clone())
    assert not module._same_bits(x, x.mT.contiguous().mT)
    assert not module._same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert module._same_bits(torch.tensor([float("nan")]), torch.tensor([float("nan")]))


def test_what_an_observer_puts_in_place_of_a_value_does_not_stay(program):
    """A replaced value is read on, and the program itself is computed from its own values the next time."""
    traced = program("llama-tiny", "raised")
    first = next(node.name for node in traced.nodes("linear"))
    replay = Replay()
    plain = replay.run(traced, IDS)
    replaced = replay.run(traced, IDS, observe=lambda node, value: value * 2 if node.name == first else value)
    assert not torch.equal(plain, replaced)
    assert torch.equal(replay.run(traced, IDS), plain)
