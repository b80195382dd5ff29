"""What waits between two passes of a stream, and what is computed again."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from mxfx.calibration import schedule
from mxfx.calibration.schedule import Schedule
from mxfx.calibration.stages import Stage, cut
from mxfx.calibration.stream import StreamOptions, stream_layers
from mxfx.graph.node import path_of
from mxfx.graph.program import Program
from mxfx.graph.tiny import tiny
from mxfx.graph.trace import trace
from mxfx.passes import RaiseAttention, RaiseNorm, RaiseRope
from mxfx.rewrite import Context, Rewriter, apply
from mxfx.rewrite.lowering import lowered_copy

_CPU = torch.device("cpu")
_TOKENS = torch.randint(3, 128, (5, 12), generator=torch.Generator().manual_seed(3))


@cache
def _program(family: str) -> Program:
    program = trace(tiny(family, layers=3))
    for pass_ in (RaiseNorm(), RaiseRope(), RaiseAttention()):
        program = apply(pass_, program).program
    return program


def _stages(family: str) -> list[Stage]:
    program = _program(family)
    targets = [node.name for node in program.nodes("linear") if path_of(node).endswith("proj")]
    return cut(lowered_copy(program, _CPU).graph, frozenset(targets))


def _kinds(stage: Stage) -> list[str]:
    return [str(node.target) for node in stage.nodes]


@pytest.mark.parametrize("family", ["llama-tiny", "gemma3-tiny", "olmo2-tiny", "phi3-tiny"])
@pytest.mark.parametrize("placement", ["device", "cpu"])
def test_passes_compute_every_node_and_read_only_what_waits(family: str, placement: str) -> None:
    stages = _stages(family)
    found = Schedule(stages, placement, _CPU)  # type: ignore[arg-type]
    waiting = {node for node in stages[0].nodes[0].graph.nodes if node.op == "placeholder"}
    computed: set[torch.fx.Node] = set()
    for index, stage in enumerate(stages):
        for one in found.until(index):
            joined = one.joined(watched=True)
            assert set(joined.inputs) <= waiting
            computed |= set(joined.nodes)
            waiting = (waiting | set(one.outputs)) - set(one.over)
        here = {node for step in found.pending for node in step.nodes}
        # What is measured is there, or comes of the steps that run again.
        assert set(stage.measured) <= waiting | here | set(stage.nodes)
        assert found.done == index
    assert computed == {node for stage in stages[:-1] for node in stage.nodes}


def test_a_wide_result_waits_on_the_device_only_and_a_norm_nowhere() -> None:
    waits: dict[str, set[int]] = {}
    for placement in ("device", "cpu"):
        found = Schedule(stages := _stages("llama-tiny"), placement, _CPU)  # type: ignore[arg-type]
        outputs = [node for i in range(len(stages)) for one in found.until(i) for node in one.outputs]
        assert not any("rms_norm" in str(node.target) for node in outputs)
        vals = [node.meta["val"] for node in outputs]
        waits[placement] = {int(val.shape[-1]) for val in vals if isinstance(val, Tensor) and val.dim() == 3}
    assert waits["cpu"] < waits["device"] and max(waits["device"] - waits["cpu"]) == 96


@pytest.mark.parametrize(("worth", "kept"), [(1e12, "attend"), (1.0, "linear")])
def test_attention_and_a_product_that_costs_more_than_its_way_are_not_computed_again(
    worth: float, kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedule, "WHILE_A_BYTE_TRAVELS", {"cpu": worth})
    found = Schedule(stages := _stages("llama-tiny"), "cpu", _CPU)
    for index in range(len(stages)):
        list(found.until(index))
        assert not any(kept in kind for step in found.pending for kind in _kinds(step))


def test_a_stream_gives_the_same_bits_however_much_it_computes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(worth: float) -> dict[str, Tensor]:
        monkeypatch.setattr(schedule, "WHILE_A_BYTE_TRAVELS", {"cpu": worth})
        rw, found = Rewriter(_program("llama-tiny").copy(), "test"), {}
        targets = [node for node in rw.program.nodes("linear") if path_of(node).endswith("proj")]
        options = StreamOptions(batch_size=2, activations="cpu", reference=True)
        for layer in stream_layers(rw, Context(), targets, _TOKENS, options):
            for group in layer.groups():
                for node in group.linears:
                    found[node.name] = group.statistics.hessian(group.source, rw.weights.hash).clone()
                    found[f"{node.name}, cross"] = group.statistics.cross(group.source, rw.weights.hash).clone()
                    name = rw.program.weight_of(node)
                    # Rewritten weights are those that run again.
                    rw.set_weight(name, rw.weights[name] * 0.5)
        return found

    never, always = measured(0.0), measured(1e12)
    assert never.keys() == always.keys() and all(torch.equal(never[name], always[name]) for name in never)
