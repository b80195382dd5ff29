"""``gptq`` on a mixture of experts: every expert by its own tokens, starving ones in view."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

from mxfx.calibration import expert_statistics
from mxfx.formats import parse
from mxfx.graph.execute import execute
from mxfx.graph.node import path_of
from mxfx.graph.program import Program
from mxfx.graph.verify import verify
from mxfx.passes import Annotate, Gptq, RoundWeights, Rule
from mxfx.rewrite import Applied, Context, Selector, apply
from mxfx.rewrite.context import StrictError
from mxfx.rewrite.operands import is_rounded
from tests.algorithms.one_weight import gptq as solve
from tests.mixtures import raised_mixture

_TOKENS = torch.randint(3, 128, (8, 48), generator=torch.Generator().manual_seed(3))
_FORMAT = parse("mxint4@32")


@cache
def _annotated(match: str = r".*experts\.(gate_up|down)_proj") -> Program:
    return apply(Annotate((Rule(Selector(match), weight=_FORMAT),)), raised_mixture("mixtral")).program


def _run(program: Program | None = None, ctx: Context | None = None, **options: object) -> Applied:
    return apply(
        Gptq(**{"batch_size": 4, "min_expert_tokens": 16, **options}),  # type: ignore[arg-type]
        program or _annotated(),
        ctx or Context(tokens=lambda: _TOKENS),
    )


def _weight(program: Program, path: str) -> torch.Tensor:
    return program.weights[path]


def test_every_expert_is_solved_by_its_own_tokens() -> None:
    applied = _run(max_layers=1)
    verify(applied.program)
    program = _annotated().copy()
    first, second = (n for n in program.nodes("expert_linear") if ".layers.0." in path_of(n))
    for node in (first, second):
        choice, source = node.args[2], node.args[0]
        x, chosen = (execute(_ending(program, end), _TOKENS) for end in (source, choice))
        path = program.weight_of(node)
        solved = []
        for expert in range(4):
            token, place = torch.where(chosen == expert)
            rows = x[token] if x.dim() == 2 else x[token, place]
            solved.append(solve(program.weights[path][expert], rows.mT @ rows, _FORMAT).weight)
        program.weights.set(path, torch.stack(solved), "test")
        # Sums in another order can flip a code that lies on a tie.
        assert (_weight(applied.program, path) != program.weights[path]).float().mean() < 0.01


def _ending(program: Program, end: object) -> Program:
    """The program that returns what a node computes."""
    copy = program.copy()
    node = next(n for n in copy.graph.nodes if n.name == end.name)  # type: ignore[attr-defined]
    output = next(n for n in copy.graph.nodes if n.op == "output")
    output.args = (node,)
    copy.graph.eliminate_dead_code()
    return copy


def test_outputs_are_nearer_than_with_rounding_to_nearest() -> None:
    program = _annotated()
    y = execute(program, _TOKENS)
    errors = [float((execute(p, _TOKENS) - y).norm()) for p in (_run().program, apply(RoundWeights(), program).program)]
    assert errors[0] < 0.8 * errors[1]


def test_what_each_layer_of_experts_got_is_told() -> None:
    record = _run().record
    assert record.warnings == [] and len(record.matches) == 4
    rows = record.details["experts"]
    assert [row["path"] for row in rows] == [path_of(n) for n in _annotated().nodes("expert_linear")]  # type: ignore[union-attr]
    assert all(row["own_hessian"] == row["experts"] == 4 and row["starved"] == {} for row in rows)  # type: ignore[union-attr]


def test_starving_experts_fall_back_in_view_and_fail_a_strict_run() -> None:
    record = _run(min_expert_tokens=190).record
    told = [row for row in record.details["experts"] if row["starved"]]  # type: ignore[union-attr]
    assert told and all(row["shared_hessian"] == len(row["starved"]) for row in told)
    assert len(record.warnings) == record.details["fallbacks"] == len(told)
    assert "took the Hessian of all tokens" in record.warnings[0]
    with pytest.raises(StrictError, match="experts got too few"):
        _run(ctx=Context(tokens=lambda: _TOKENS, strict=True), min_expert_tokens=190)
    nearest = _run(min_expert_tokens=10_000, max_layers=1)
    rounded = apply(RoundWeights(), _annotated()).program
    path = "model.layers.0.mlp.experts.down_proj"
    assert torch.equal(_weight(nearest.program, path), _weight(rounded, path))


def test_ranges_of_experts_give_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _run(asymmetric=0.25)
    monkeypatch.setitem(expert_statistics.BUDGET, "cpu", 1)
    parts = _run(asymmetric=0.25)
    for node in parts.program.nodes("expert_linear"):
        path = parts.program.weight_of(node)
        assert is_rounded(node, "weight")
        assert torch.equal(_weight(parts.program, path), _weight(whole.program, path))


def test_a_run_that_is_started_again_ends_with_the_same_bytes(tmp_path: Path) -> None:
    ctx = Context(tokens=lambda: _TOKENS, cache=tmp_path)
    first = _run(_annotated(r".*(proj|experts.*)"), ctx)
    again = _run(_annotated(r".*(proj|experts.*)"), ctx)
    assert again.record.details["resumed_layers"] == 2
    assert again.record.details["experts"] == first.record.details["experts"]
    for name in first.program.weights:
        assert torch.equal(first.program.weights[name], again.program.weights[name])
