"""Gradients at the float model, of tokens that it draws itself."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, fx

from mxfx.calibration import moments
from mxfx.calibration.fisher import gradient_moments, token_importance, watch_gradients
from mxfx.calibration.stages import input_of
from mxfx.graph.execute import execute
from mxfx.graph.node import path_of
from mxfx.graph.program import Program
from mxfx.graph.tiny import tiny
from mxfx.graph.trace import trace
from mxfx.passes import RaiseAttention, RaiseNorm, RaiseRope
from mxfx.rewrite import Context, Rewriter, apply

_TOKENS = torch.randint(3, 128, (4, 12), generator=torch.Generator().manual_seed(3))


@cache
def _raised() -> Program:
    program = trace(tiny("llama-tiny", layers=2))
    for pass_ in (RaiseNorm(), RaiseRope(), RaiseAttention()):
        program = apply(pass_, program).program
    return program.twin(torch.float64)


def _linears(program: Program, *names: str) -> list[fx.Node]:
    return [node for node in program.nodes("linear") if path_of(node).endswith(names)]


def _seen(program: Program, nodes: list[fx.Node]) -> dict[fx.Node, Tensor]:
    found: dict[fx.Node, list[Tensor]] = {node: [] for node in nodes}
    watch_gradients(program, {node: parts.append for node, parts in found.items()}, Context(), _TOKENS)
    return {node: torch.cat(parts) for node, parts in found.items()}


def test_at_the_logits_it_is_the_token_drawn_less_its_chance() -> None:
    program = _raised()
    (head,) = _linears(program, "lm_head")
    one_hot = _seen(program, [head])[head] + execute(program, _TOKENS).softmax(-1)
    assert torch.allclose(one_hot.sum(-1), torch.ones(4, 12, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(one_hot.amax(-1), torch.ones(4, 12, dtype=torch.float64), atol=1e-6)


def test_at_an_input_it_is_what_all_linears_that_read_it_pass_back() -> None:
    program = _raised()
    readers = _linears(program, "layers.1.mlp.gate_proj", "layers.1.mlp.up_proj")
    source = input_of(readers[0])
    seen = _seen(program, [source, *readers])
    passed = sum(seen[node] @ program.weights[program.weight_of(node)].double() for node in readers)
    assert torch.allclose(seen[source], passed, rtol=1e-6, atol=1e-9)  # type: ignore[arg-type]


def test_the_program_stays_as_it_is() -> None:
    program = _raised()
    before = str(program.graph)
    _seen(program, _linears(program, "down_proj"))
    assert str(program.graph) == before


def test_moments_are_those_of_the_gradients_block_by_block() -> None:
    program = _raised()
    attention = next(program.nodes("attention"))
    (down, *_) = _linears(program, "down_proj")
    x, k = input_of(down), attention.args[1]
    assert isinstance(k, fx.Node)
    seen = _seen(program, [x, k])
    moments = gradient_moments(program, {x: 8, k: 8}, Context(), _TOKENS)
    rows = seen[x].flatten(0, -2)
    assert torch.allclose(moments[x][1], rows[:, 8:16].mT @ rows[:, 8:16] / len(rows), rtol=1e-5, atol=1e-12)
    head = seen[k][:, 1].flatten(0, 1)
    assert torch.allclose(moments[k][1, 0], head[:, :8].mT @ head[:, :8] / len(head), rtol=1e-5, atol=1e-12)


def test_importance_is_the_mean_square_over_the_outputs_of_one_input() -> None:
    program = _raised()
    readers = _linears(program, "layers.0.self_attn.q_proj", "layers.0.self_attn.k_proj", "layers.0.self_attn.v_proj")
    seen = _seen(program, readers)
    squares = sum(seen[node].float().square().sum(-1) for node in readers)
    found = token_importance(program, readers, Context(), _TOKENS)
    assert found.keys() == {node.name for node in readers}
    for value in found.values():
        assert value.shape == _TOKENS.shape
        assert torch.allclose(value, squares / squares.mean(), rtol=1e-5)  # type: ignore[union-attr]


def test_where_the_weights_have_no_room_it_says_what_to_do_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "free_bytes", lambda device: 1)
    # Weights of the device's own dtype are not copied: float32 ones would be.
    program = _raised().twin(torch.float32)
    program.dtype = torch.bfloat16
    with pytest.raises(ValueError, match="guided = false"):
        gradient_moments(program, {_linears(program, "lm_head")[0]: 8}, Context(), _TOKENS)


def test_logits_that_are_not_finite_are_said() -> None:
    program = _raised().copy()
    name = program.weight_of(_linears(program, "lm_head")[0])
    program.weights.set(name, torch.full_like(program.weights[name], torch.nan), "test")
    with pytest.raises(ValueError, match="not finite"):
        _seen(program, _linears(program, "layers.1.mlp.down_proj"))


def test_what_the_loss_does_not_depend_on_has_none() -> None:
    program = _raised().copy()
    rw = Rewriter(program, "test")
    (down, *_) = _linears(program, "layers.1.mlp.down_proj")
    weight = down.args[1]
    aside = rw.call(torch.ops.aten.linear.default, input_of(down), weight, like=down, after=down)
    found = token_importance(program, [down], Context(), _TOKENS)
    assert found.keys() == {down.name}
    assert token_importance(program, [aside], Context(), _TOKENS) == {}
    assert gradient_moments(program, {aside: 8}, Context(), _TOKENS) == {}
