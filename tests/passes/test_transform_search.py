"""``transform-search`` takes the candidate with the smallest held-out output error at each input."""

from __future__ import annotations

import json

import pytest

from mxfx.formats import parse
from mxfx.graph.node import kind
from mxfx.passes import Annotate, FuseNorm, Rule, TransformSearch
from mxfx.passes import transform_search as module
from mxfx.rewrite import Selector, apply
from tests.mixtures import raised_mixture

INT4 = parse("mxint4@16")
CANDIDATES = ("none", "hadamard-16", "hadamard-32", "hadamard-full", "wush-16", "wush-32", "scaled-16")


@pytest.fixture
def annotated(raised):
    rule = Rule(Selector(r"model\.layers\..*_proj"), weight=INT4, input=INT4)
    return lambda family: apply(Annotate(rule=(rule,)), apply(FuseNorm(), raised(family)).program).program


@pytest.mark.parametrize(
    "family", ["llama-tiny", "qwen2-tiny", "qwen3-tiny", "mistral-tiny", "phi3-tiny", "olmo2-tiny"]
)
def test_the_choice_has_the_smallest_error_and_the_function_stays(family, annotated, preserved):
    _, record = preserved(TransformSearch(candidates=CANDIDATES), annotated(family))
    decisions, check = record.details["sites"], record.details["check"]
    assert len(decisions) == 2 * 4
    assert check["kept"] == min(check["kl"], key=check["kl"].get)
    for decision in decisions.values():
        assert set(decision["errors"]) == set(CANDIDATES)
        if check["kept"] == "by site":
            assert decision["errors"][decision["chosen"]] == min(decision["errors"].values())
        else:
            assert check["kept"] == f"{decision['chosen']} everywhere"
    json.dumps(record.details)


@pytest.mark.parametrize("candidate", CANDIDATES[1:])
def test_every_candidate_preserves_the_function(candidate, annotated, preserved):
    program, record = preserved(TransformSearch(candidates=(candidate,)), annotated("llama-tiny"))
    assert len(record.matches) == 8
    assert sum(kind(n) in ("hadamard", "block_transform") for n in program.graph.nodes) == 8


def test_candidates_that_do_not_fit_are_listed_with_the_reason(annotated, preserved):
    _, record = preserved(TransformSearch(candidates=("none", "hadamard-20")), annotated("llama-tiny"))
    assert "96 channels" in record.details["sites"]["model.layers.0.mlp.down_proj"]["skipped"]["hadamard-20"]


def test_an_unknown_candidate_is_refused_at_once():
    with pytest.raises(ValueError, match="unknown candidate 'wish-32'"):
        TransformSearch(candidates=("wish-32",))


def test_kept_decisions_are_not_searched_again(annotated, ctx, tmp_path, monkeypatch):
    pass_ = TransformSearch(candidates=CANDIDATES, cache_path=tmp_path / "sites.json")
    before = annotated("llama-tiny")
    first = apply(pass_, before, ctx)
    monkeypatch.setattr(module, "_error", lambda *a: pytest.fail("searched again"))
    again = apply(pass_, before, ctx)
    assert {k: v for k, v in again.record.details.items() if k != "key"} == first.record.details


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_inputs_of_experts_get_a_transform_too(name, ctx):
    rule = Rule(Selector(role="attention, mlp"), weight=INT4, input=INT4)
    annotated = apply(Annotate(rule=(rule,)), raised_mixture(name)).program
    done = apply(TransformSearch(candidates=("none", "hadamard-16", "wush-16")), annotated, ctx)
    read = {n.args[0].name for n in done.program.nodes("expert_linear")}
    errors = done.record.details["sites"]
    assert any("experts" in path for site in errors.values() for path in site["linears"])
    assert read and all(0 < error < 1 for site in errors.values() for error in site["errors"].values())
