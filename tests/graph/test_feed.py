"""Weights that come one after the other: those that are read, a few ahead, and never old ones."""

from contextlib import closing

import pytest
import torch
from torch import Tensor, fx

from mxfx.graph.execute import execute
from mxfx.graph.feed import _AHEAD, Feed
from mxfx.graph.program import Program
from mxfx.graph.tiny import tiny
from mxfx.graph.trace import trace
from mxfx.graph.transfers import Arrival, Transfers

_CPU = torch.device("cpu")
_IDS = torch.arange(12).view(2, 6)


@pytest.fixture
def program() -> Program:
    return trace(tiny("llama-tiny", layers=2))


def test_few_weights_are_on_their_way(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []
    staged_up = Transfers.staged_up

    def counted(self: Transfers, source: Tensor) -> Arrival:
        begun.append(id(source))
        return staged_up(self, source)

    monkeypatch.setattr(Transfers, "staged_up", counted)
    with closing(Feed(program, _CPU)) as feed:
        taken = 0

        def take(node: fx.Node) -> Tensor:
            nonlocal taken
            taken += 1
            found = feed(node)
            assert taken <= len(begun) <= taken + _AHEAD
            return found

        assert torch.equal(execute(program, _IDS, feed=take), execute(program, _IDS))
    assert taken == len(begun) > 2 + _AHEAD
    assert len(set(begun)) == len({id(tensor) for tensor in program.weights.values()})


def test_a_run_that_ended_early_leaves_no_old_weight(program: Program) -> None:
    with closing(Feed(program, _CPU)) as feed:

        def stop(node: fx.Node, value: object) -> object:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            execute(program, _IDS, feed=feed, observe=stop)
        for name, tensor in list(program.weights.items()):
            program.weights.set(name, tensor * 1.25, "test")
        feed.start()
        assert torch.equal(execute(program, _IDS, feed=feed), execute(program, _IDS))


def test_a_weight_without_numbers_is_an_error() -> None:
    program = trace(tiny("llama-tiny", layers=2).to("meta"))
    with closing(Feed(program, _CPU)) as feed, pytest.raises(ValueError, match="no data"):
        execute(program, _IDS, feed=feed)
