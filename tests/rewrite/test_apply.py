"""``apply``: facts before, the rewrite on a copy, facts after; the registry of passes and of facts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from mxfx import passes
from mxfx.graph.program import Program
from mxfx.rewrite import (
    Context,
    Fact,
    FactError,
    MissingCalibration,
    Pass,
    Rewriter,
    Selector,
    UnknownPass,
    apply,
    find_fact,
    find_pass,
    register,
)
from mxfx.rewrite.facts import RAISED, Selected, all_facts
from mxfx.rewrite.pass_ import _REGISTRY
from tests.programs import raised, traced

GATES = Selector(r".*gate_proj")


@pytest.fixture(autouse=True)
def _registries() -> Iterator[None]:
    passes = dict(_REGISTRY)
    yield
    _REGISTRY.clear()
    _REGISTRY.update(passes)


RELU_FREE = Fact("relu-free", "no rectifier")


@RELU_FREE.means
def no_relu(program: Program, selected: Selected) -> str | None:
    found = [n.name for n in program.graph.nodes if n.target is torch.ops.aten.relu.default and selected(n)]
    return f"{found[0]} is a rectifier" if found else None


@dataclass(frozen=True)
class Rectify(Pass):
    """Put a rectifier behind linears."""

    name: ClassVar[str] = "test-rectify"
    requires: ClassVar[frozenset[Fact]] = frozenset({RAISED})
    select: Selector = GATES

    def run(self, rw: Rewriter, ctx: Context) -> None:
        for node in rw.program.nodes("linear"):
            if self.select(node) and rw.match(node):
                rw.replace(node, rw.call(torch.ops.aten.relu.default, node, like=node, after=node))


@dataclass(frozen=True)
class Promise(Rectify):
    """Promises what it breaks."""

    name: ClassVar[str] = "test-promise"
    provides: ClassVar[frozenset[Fact]] = frozenset({RELU_FREE})


@dataclass(frozen=True)
class Early(Rectify):
    """May not follow the raise passes."""

    name: ClassVar[str] = "test-early"
    requires: ClassVar[frozenset[Fact]] = frozenset()
    forbids: ClassVar[frozenset[Fact]] = frozenset({RAISED})


def test_the_pass_gets_a_copy() -> None:
    program = raised("llama-tiny")
    before = str(program.graph)
    applied = apply(Rectify(), program)
    assert str(program.graph) == before
    assert [m.path for m in applied.record.matches] == ["model.layers.0.mlp.gate_proj", "model.layers.1.mlp.gate_proj"]


def test_a_missing_fact_is_named_with_its_meaning() -> None:
    with pytest.raises(FactError, match=r"'test-rectify' requires 'raised' \(norms, rotary embeddings and attention"):
        apply(Rectify(), traced("llama-tiny"))


def test_a_forbidden_fact_is_named() -> None:
    with pytest.raises(FactError, match="'test-early' must come before 'raised' holds"):
        apply(Early(), raised("llama-tiny"))


def test_a_broken_promise_is_found_by_the_fact_s_predicate() -> None:
    with pytest.raises(FactError, match=r"'test-promise' promises 'relu-free', but relu\S* is a rectifier"):
        apply(Promise(), raised("llama-tiny"))


def test_half_a_pass_promises_nothing() -> None:
    applied = apply(Promise(), raised("llama-tiny"), limit=1)
    assert len(applied.record.matches) == 1 and applied.record.limited


def test_facts_that_held_before_hold_after() -> None:
    program = raised("llama-tiny").copy()
    program.facts |= {"a-fact"}
    assert apply(Rectify(), program).program.facts == program.facts


def test_a_pass_is_found_by_its_name_and_a_typo_by_its_neighbour() -> None:
    register(Rectify)
    assert find_pass("test-rectify") is Rectify
    with pytest.raises(UnknownPass, match="did you mean 'test-rectify'"):
        find_pass("test-rectfy")
    with pytest.raises(FactError, match="did you mean 'raised'"):
        find_fact("raised?")


def test_names_of_passes_are_kebab_case_and_unique() -> None:
    register(Rectify)
    with pytest.raises(ValueError, match="not kebab-case"):
        register(type("Bad", (Rectify,), {"name": "Test_Pass"}))
    with pytest.raises(ValueError, match=r"'test-rectify' is taken by .*\.Rectify"):
        register(type("Other", (Rectify,), {"name": "test-rectify"}))


def test_names_of_facts_are_unique() -> None:
    with pytest.raises(ValueError, match="'relu-free' is already defined: no rectifier"):
        Fact("relu-free", "again")
    with pytest.raises(ValueError, match="'relu-free' already has a predicate, no_relu"):
        RELU_FREE.means(lambda program, selected: None)


def test_a_misspelt_fact_cannot_be_imported() -> None:
    with pytest.raises(FactError, match="unknown fact 'raisd'; did you mean 'raised'"):
        type("Bad", (Rectify,), {"requires": frozenset({"raisd"})})
    with pytest.raises(FactError, match=r"Bad: the fact 'raised' is text; import its object .*facts\.RAISED"):
        type("Bad", (Rectify,), {"requires": frozenset({"raised"})})


def test_every_fact_has_a_predicate() -> None:
    passes.load_all()
    program = raised("llama-tiny")
    for name, fact in all_facts().items():
        if not name.startswith(("stub-", "relu-")):
            assert fact.check(program, lambda node: False) is None or name in ("annotated", "lowered", "norms-fused"), (
                name
            )


def test_a_promise_holds_for_what_the_pass_selects_and_does_not_skip() -> None:
    program = apply(Rectify(), raised("llama-tiny")).program
    assert RELU_FREE.check(program, lambda node: False) is None
    assert "is a rectifier" in str(RELU_FREE.check(program))


def test_a_selector_matches_whole_paths() -> None:
    assert Selector(r"model\.layers\.\d+\.mlp").names("model.layers.11.mlp")
    assert not Selector(r"model\.layers\.\d+\.mlp").names("model.layers.11.mlp.up_proj")
    with pytest.raises(ValueError, match=r"is no regular expression: .* at position 0"):
        Selector("(mlp")


def test_calibration_that_is_not_there_is_asked_for() -> None:
    with pytest.raises(MissingCalibration, match=r"\[calibration\]"):
        Context().tokens()


def test_generators_of_different_purposes_differ_and_repeat() -> None:
    draw = lambda seed, purpose: torch.rand(3, generator=Context(seed=seed).generator(purpose)).tolist()  # noqa: E731
    assert draw(0, "signs") == draw(0, "signs")
    assert draw(0, "signs") != draw(0, "tokens") != draw(1, "tokens")
