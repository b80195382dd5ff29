"""What training is made of: the divergence and its gradient, gradients anew at each step, weights behind grids."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mxfx.calibration import teacher, training
from mxfx.calibration.distillation import Distillation, MovingAverage, Plan, Update
from mxfx.calibration.staged import Staged
from mxfx.calibration.training import GradientStep, divergence, trainable
from mxfx.formats import parse
from mxfx.graph.program import Program
from mxfx.graph.tiny import tiny
from mxfx.graph.trace import trace
from mxfx.passes import RaiseAttention, RaiseNorm, RaiseRope
from mxfx.rewrite import Context, apply

CPU = torch.device("cpu")


def _program() -> Program:
    program = trace(tiny("llama-tiny"))
    for raising in (RaiseNorm(), RaiseRope(), RaiseAttention()):
        program = apply(raising, program).program
    return program


def _reference(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    p, q = expected.double().log_softmax(-1), actual.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean()


@pytest.mark.parametrize("in_c", [True, False])
def test_divergence_and_its_gradient_whatever_rows_are_taken_at_a_time(
    in_c: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not in_c:
        monkeypatch.setattr(training, "logit_rows", lambda *_, **__: None)
        monkeypatch.setattr(training, "_ROWS", {"cpu": 3})
    generator = torch.Generator().manual_seed(0)
    actual = torch.randn(2, 5, 11, generator=generator, requires_grad=True)
    expected = torch.randn(2, 5, 11, generator=generator)
    found, wanted = divergence(actual, expected), _reference(actual, expected)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-7)
    (of_found,), (of_wanted,) = torch.autograd.grad(found, actual), torch.autograd.grad(wanted, actual)
    torch.testing.assert_close(of_found, of_wanted, rtol=1e-5, atol=1e-7)


def test_of_equal_logits_it_is_nothing() -> None:
    logits = torch.randn(4, 7)
    assert abs(float(divergence(logits, logits))) < 1e-6


@pytest.mark.cuda
@pytest.mark.parametrize("columns", [11, 5000, 49152])
def test_the_kernel_s_divergence_and_gradient(columns: int) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    actual = torch.randn(2, 3, columns, device="cuda", generator=generator, requires_grad=True)
    expected = torch.randn(2, 3, columns, device="cuda", generator=generator)
    found, wanted = divergence(actual, expected), _reference(actual, expected)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-7)
    (of_found,), (of_wanted,) = torch.autograd.grad(found, actual), torch.autograd.grad(wanted, actual)
    torch.testing.assert_close(of_found, of_wanted, rtol=1e-4, atol=1e-8)


def _gradients(device: torch.device) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Gradients of the second of two batches by `GradientStep`, and by autograd alone."""
    program = _program()
    name = "model.layers.1.mlp.down_proj.weight"
    module, parameters = trainable(program, {name: parse("mxint4@32")}, device)
    tuned = list(parameters.values())
    first, second = torch.randint(3, 128, (2, 3, 16), generator=torch.Generator().manual_seed(0))

    def loss(ids: torch.Tensor) -> torch.Tensor:
        return module(ids).float().square().mean()

    step = GradientStep(loss, tuned, device)
    step(first)
    step(second)
    by_step = [p.grad.clone() for p in tuned]
    return by_step, list(torch.autograd.grad(loss(second.to(device)), tuned))


def test_each_step_has_the_gradients_of_its_own_batch() -> None:
    by_step, alone = _gradients(CPU)
    assert all(torch.equal(a, b) for a, b in zip(by_step, alone, strict=True))


@pytest.mark.cuda
def test_a_replayed_graph_has_the_gradients_of_its_own_batch() -> None:
    by_step, alone = _gradients(torch.device("cuda"))
    for a, b in zip(by_step, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def _updated(device: torch.device) -> tuple[list[torch.Tensor], list[float]]:
    """Two parameters with rates of their own after five updates, and how many steps Adam counted."""
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(6, 4, generator=generator).to(device)) for _ in range(2)]
    gradients = [torch.randn(6, 4, generator=generator).to(device) for _ in range(10)]
    update = Update(parameters, [1e-2, 1e-3], device)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    for index in range(5):
        for parameter, gradient in zip(parameters, gradients[2 * index :], strict=False):
            parameter.grad.copy_(gradient)
        update(1 - index / 5)
    return [p.detach().cpu() for p in parameters], [float(update.state[p]["step"]) for p in parameters]


def test_each_parameter_moves_at_its_own_rate() -> None:
    generator = torch.Generator().manual_seed(0)
    before = [torch.randn(6, 4, generator=generator) for _ in range(2)]
    after, steps = _updated(CPU)
    moved = [float((a - b).abs().mean()) for a, b in zip(after, before, strict=True)]
    assert 5 < moved[0] / moved[1] < 20 and steps == [5.0, 5.0]


@pytest.mark.cuda
def test_recorded_updates_are_those_of_a_cpu() -> None:
    (found, steps), (wanted, _) = _updated(torch.device("cuda")), _updated(CPU)
    assert steps == [5.0, 5.0]
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_a_moving_average_is_the_plain_mean_until_its_reach_and_then_forgets(device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(2, 3, generator=generator, dtype=torch.float64) for _ in range(9)]
    parameter = torch.nn.Parameter(torch.empty(2, 3, dtype=torch.float64, device=device))
    average = MovingAverage([parameter], 4)
    wanted = torch.zeros(2, 3, dtype=torch.float64)
    for step, state in enumerate(states, start=1):
        with torch.no_grad():
            parameter.copy_(state)
        average.add(step)
        wanted = torch.stack(states[:step]).mean(0) if step <= 4 else 0.75 * wanted + 0.25 * state
        torch.testing.assert_close(average.means[0].cpu(), wanted, rtol=0, atol=1e-14)
    place = parameter.data_ptr()
    with average.in_place():
        torch.testing.assert_close(parameter.detach().cpu(), wanted, rtol=0, atol=1e-14)
        assert parameter.data_ptr() == place
    assert torch.equal(parameter.detach().cpu(), states[-1])


def test_a_parameter_stands_behind_its_grid_and_everything_else_is_constant() -> None:
    program = _program()
    name, fmt = "model.layers.0.mlp.up_proj.weight", parse("mxint4@32/mse")
    module, parameters = trainable(program, {name: fmt}, CPU)
    ids = torch.randint(3, 128, (2, 8))
    assert [n for n, p in module.named_parameters() if p.requires_grad] == [name]
    before = module(ids)
    with torch.no_grad():
        parameters[name].copy_(fmt.fake_quantize(parameters[name]))
    assert torch.equal(module(ids), before)
    assert not torch.equal(program.weights[name], parameters[name])


@pytest.mark.parametrize(("accumulate", "count", "size"), [(1, 5, 5), (2, 4, 2), (2, 5, 1), (3, 8, 2), (4, 3, 1)])
def test_parts_of_a_batch_are_alike(accumulate: int, count: int, size: int) -> None:
    assert Plan(1, count, 1.0, accumulate).part(count) == size


def _tuned(accumulate: int, file: Path | None = None) -> dict[str, torch.nn.Parameter]:
    """Two parameters that a loss reaches behind one that it does not, after three steps."""
    generator = torch.Generator().manual_seed(0)
    parameters = {name: torch.nn.Parameter(torch.randn(3, generator=generator)) for name in ("idle", "first", "second")}
    given = torch.randn(8, 3, generator=generator)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return (x * parameters["first"] + parameters["second"].square() - 1).square().mean()

    plan = Plan(3, 4, 0.1, accumulate, check_every=1, checkpoint_every=1)
    Distillation(
        plan,
        parameters,
        loss,
        lambda: float(loss(given).detach()),
        lambda chosen: (given[chosen],),
        8,
        Context(),
        file=file,
    ).run()
    return parameters


@pytest.mark.parametrize("accumulate", [2, 4])
def test_parts_give_each_parameter_its_own_gradient_where_one_has_none(accumulate: int, tmp_path: Path) -> None:
    whole, parts = _tuned(1, tmp_path / "whole"), _tuned(accumulate, tmp_path / "parts")
    for name, parameter in whole.items():
        torch.testing.assert_close(parts[name], parameter, rtol=1e-5, atol=1e-6)
    again = _tuned(accumulate, tmp_path / "parts")
    assert all(torch.equal(again[name], parameter) for name, parameter in parts.items())


def test_ranks_keep_the_float_model_s_states_together_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    module = trainable(_program(), {}, CPU)[0]
    tokens = torch.randint(3, 128, (4, 8))
    of = teacher.Teacher(Staged(module), Context())
    assert of.samples(tokens, 2, often=True).states is not None
    monkeypatch.setattr(teacher.ranks, "collected", lambda room: [room, 0])
    assert of.samples(tokens, 2, often=True).states is None
