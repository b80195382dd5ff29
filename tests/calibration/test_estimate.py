"""What a stream is expected to take, beside the tensors that are really there when it runs."""

from __future__ import annotations

from functools import cache
from itertools import chain

import pytest
import torch
from torch import Tensor

from mxfx.algorithms.gptq import asymmetric_target, gptq_batch
from mxfx.algorithms.hessian_factor import permute_symmetric
from mxfx.calibration.estimate import Footprint, LiveBytes, footprint, place, solver_bytes, target_bytes
from mxfx.calibration.stream import StreamOptions, stream_layers
from mxfx.formats import parse
from mxfx.graph.node import path_of
from mxfx.graph.program import Program
from mxfx.graph.tiny import tiny
from mxfx.graph.trace import trace
from mxfx.graph.transfers import HostBuffers
from mxfx.passes import RaiseAttention, RaiseNorm, RaiseRope
from mxfx.rewrite import Context, Rewriter, apply
from mxfx.rewrite.lowering import lowered_copy

_CPU = torch.device("cpu")


@cache
def _program() -> Program:
    program = trace(tiny("llama-tiny", layers=2))
    for pass_ in (RaiseNorm(), RaiseRope(), RaiseAttention()):
        program = apply(pass_, program).program
    return program


def _targets(program: Program) -> list[torch.fx.Node]:
    return [node for node in program.nodes("linear") if path_of(node).endswith("proj")]


def _footprint(samples: int, length: int, batch_size: int) -> Footprint:
    program = _program()
    return footprint(
        lowered_copy(program, _CPU),
        [node.name for node in _targets(program)],
        (samples, length),
        device=_CPU,
        stored={},
        batch_size=batch_size,
    )


@pytest.mark.parametrize(("samples", "length", "batch_size"), [(8, 96, 4), (12, 64, 2), (3, 128, 8)])
def test_the_peak_of_a_stream_is_within_15_percent_of_the_estimate(samples: int, length: int, batch_size: int) -> None:
    rw = Rewriter(_program().copy(), "test")
    ids = torch.randint(3, 128, (samples, length), generator=torch.Generator().manual_seed(0))
    options = StreamOptions(batch_size=batch_size, activations="device")
    layers = stream_layers(rw, Context(), _targets(rw.program), ids, options)
    first = next(layers)
    with LiveBytes() as live:
        for layer in chain([first], layers):
            for _ in layer.groups():
                pass
    expected = _footprint(samples, length, batch_size)
    assert live.peak == pytest.approx(expected.device("device"), rel=0.15)


@pytest.mark.parametrize(("rows", "columns"), [([256, 64, 64], 512), ([1024], 256), ([128], 1024)])
def test_the_peak_of_the_solver_is_within_15_percent_of_the_formula(rows: list[int], columns: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2 * columns, columns, generator=generator)
    weights: list[Tensor] = [torch.randn(n, columns, generator=generator) for n in rows]
    hessian = x.mT @ x
    with LiveBytes() as live:
        gptq_batch(weights, hessian, parse("mxint4@32"))
    mine = 4 * columns * columns + 4 * sum(rows) * columns
    assert live.peak + mine == pytest.approx(solver_bytes(sum(rows), columns), rel=0.15)


@pytest.mark.parametrize(("rows", "columns"), [(384, 512), (1024, 256), (128, 1024)])
def test_the_peak_of_moved_targets_is_within_15_percent_of_the_formula(rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2 * columns, columns, generator=generator) for _ in range(2))
    weight, hessian, cross = torch.randn(rows, columns, generator=generator), x.mT @ x, x.mT @ y
    kept = [t.clone() for t in (weight, hessian, cross)]
    with LiveBytes() as live:
        found = asymmetric_target(weight, hessian, cross)
    assert found.shape == weight.shape and all(map(torch.equal, kept, (weight, hessian, cross)))
    mine = 4 * columns * columns + 4 * rows * columns
    assert live.peak + mine == pytest.approx(target_bytes(rows, columns), rel=0.15)


def test_an_index_by_both_axes_counts_what_cuda_spells_out() -> None:
    x, order = torch.randn(64, 64), torch.randperm(64)
    with LiveBytes() as both:
        found = x[order[:, None], order[None, :]]
    with LiveBytes() as one_by_one:
        permuted = permute_symmetric(x[None], order[None])[0]
    assert torch.equal(permuted, found)
    assert both.peak >= 4 * 64**2 + 2 * 8 * 64**2
    # The matrix itself, its rows in order, the result.
    assert one_by_one.peak <= 3.1 * 4 * 64**2


def test_values_wait_where_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Footprint(running=1 << 20, resident=9 << 30, solving=1 << 20, waiting=8 << 30)
    monkeypatch.setattr("mxfx.calibration.estimate.host_bytes", lambda: 16 << 30)
    assert place(found, _CPU) == "device"
    monkeypatch.setattr("mxfx.calibration.estimate.host_bytes", lambda: 8 << 30)
    assert place(found, _CPU) == "disk"
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (8 << 30, 8 << 30))
    assert place(found, torch.device("cuda")) == "disk"
    monkeypatch.setattr("mxfx.calibration.estimate.host_bytes", lambda: 16 << 30)
    assert place(found, torch.device("cuda")) == "cpu"
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (16 << 30, 16 << 30))
    assert place(found, torch.device("cuda")) == "device"


@pytest.mark.parametrize(("samples", "batch_size"), [(8, 4), (12, 2)])
def test_values_that_wait_elsewhere_take_what_the_estimate_says(samples: int, batch_size: int) -> None:
    rw = Rewriter(_program().copy(), "test")
    ids = torch.randint(3, 128, (samples, 64), generator=torch.Generator().manual_seed(0))
    options = StreamOptions(batch_size=batch_size, activations="cpu")
    held, take = [0], HostBuffers.take

    def counted(self: HostBuffers, nbytes: int) -> Tensor:
        buffer = take(self, nbytes)
        held.append(self.bytes)
        return buffer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HostBuffers, "take", counted)
        for layer in stream_layers(rw, Context(), _targets(rw.program), ids, options):
            for _ in layer.groups():
                pass
    expected = _footprint(samples, 64, batch_size)
    assert max(held) == pytest.approx(expected.waiting, rel=0.15)
