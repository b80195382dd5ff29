"""``rotation-search`` finds greedily which types of matmul to rotate."""

from __future__ import annotations

import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mxfx.formats import parse
from mxfx.graph.module import build
from mxfx.graph.node import info, path_of
from mxfx.passes import Annotate, InsertFakeQuant, Lower, OnlineRotation, QuantizeKvCache, RotationSearch, Rule
from mxfx.passes import rotation_search as module
from mxfx.rewrite import Selector, apply

INT4 = parse("mxint4@16")
RULES = (Rule(Selector(r"model\.layers\..*_proj"), input=INT4), Rule(Selector(r".*self_attn"), kv=INT4))
SITES = ("q_proj", "down_proj", "kv_cache")


@pytest.fixture
def annotated(raised):
    return apply(Annotate(rule=RULES), raised("llama-tiny")).program


def test_the_search_scores_what_the_pipeline_would_compute(annotated, ctx):
    tokens = ctx.tokens()
    members = {site: module._members(annotated, site) for site in SITES}
    score = module._scorer(annotated, members, 0, ctx, tokens)
    chosen = OnlineRotation(select=Selector(r".*(down_proj|self_attn)"), sites=("linear", "kv_cache"))
    program = annotated
    for pass_ in (chosen, InsertFakeQuant(), QuantizeKvCache(), Lower()):
        program = apply(pass_, program, ctx).program
    expected = module._perplexity(build(program), (tokens,))
    assert score(["down_proj", "kv_cache"]) == pytest.approx(expected, rel=1e-9)
    assert score([]) != pytest.approx(expected, rel=1e-6)


class _Counted(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_trials_round_by_the_kernel_of_the_device_to_the_bits_of_the_definition():
    x = torch.randn(2, 8, 64, dtype=torch.bfloat16)
    on, off = torch.tensor(True), torch.tensor(False)
    with _Counted() as counted:
        plain, turned = module.quantized_ways(x, "mxint4@16", [off, on], torch.eye(8), torch.eye(8))
    assert counted.names.count("mxfx_kernels.fake_quantize.default") == 2
    assert torch.equal(plain, INT4.fake_quantize(x))
    assert not torch.equal(turned, plain)


def test_each_round_keeps_the_type_with_the_lowest_perplexity(annotated, preserved):
    _, record = preserved(RotationSearch(sites=SITES, improvement_eps=-1e9), annotated)
    found = record.details
    assert sorted(found["winners"]) == sorted(SITES)
    for step in found["steps"]:
        assert step["winner"] == min(step["perplexity"], key=step["perplexity"].get)
    assert found["perplexity"] == found["steps"][-1]["perplexity"][found["winners"][-1]]


def test_no_gain_no_rotation(annotated, preserved):
    program, record = preserved(RotationSearch(sites=SITES, improvement_eps=1e9), annotated)
    assert record.details["winners"] == []
    assert not record.matches
    assert record.skips and all(skip.done for skip in record.skips)
    assert all("input" in info(n).formats for n in program.nodes("linear") if path_of(n) != "lm_head")


# What is rotated → its perplexity; every round but the second gains.
UNEVEN = {"": 9.0, "q": 8.0, "d": 8.5, "k": 8.6, "dq": 8.2, "kq": 8.3, "dkq": 7.0}


@pytest.mark.parametrize(("patience", "winners", "rounds"), [(0, "q", 2), (1, "qdk", 3), (5, "qdk", 3)])
def test_patience_looks_beyond_a_round_that_gains_nothing(
    annotated, ctx, monkeypatch, patience: int, winners: str, rounds: int
):
    def scorer(*_):
        return lambda rotated: UNEVEN["".join(sorted(site[0] for site in rotated))]

    monkeypatch.setattr(module, "_scorer", scorer)
    found = apply(RotationSearch(sites=SITES, patience=patience), annotated, ctx).record.details
    assert "".join(site[0] for site in found["winners"]) == winners
    assert found["perplexity"] == UNEVEN["".join(sorted(winners))]
    assert len(found["steps"]) == rounds
    assert [step["winner"] for step in found["steps"] if step["winner"]] == found["winners"]


def test_what_patience_did_not_find_better_is_not_rotated(annotated, ctx, monkeypatch):
    monkeypatch.setattr(module, "_scorer", lambda *_: lambda rotated: 9.0 if len(rotated) == 1 else 10.0)
    found = apply(RotationSearch(sites=SITES, patience=2), annotated, ctx).record
    assert len(found.details["winners"]) == 1 and found.details["perplexity"] == 9.0
    assert [step["winner"] is None for step in found.details["steps"]] == [False, True, True]
    assert {skip.path.rsplit(".", 1)[-1] for skip in found.skips} >= {"down_proj"}


def test_patience_below_nothing_is_refused():
    with pytest.raises(ValueError, match="patience"):
        RotationSearch(patience=-1)


def test_later_runs_read_the_winners_and_search_nothing(annotated, ctx, tmp_path, monkeypatch):
    pass_ = RotationSearch(sites=SITES, cache_path=tmp_path / "made" / "winners.json", improvement_eps=-1e9)
    first = apply(pass_, annotated, ctx)
    monkeypatch.setattr(module, "_scorer", lambda *a: pytest.fail("searched again"))
    again = apply(pass_, annotated, ctx)
    assert again.record.details["winners"] == first.record.details["winners"]
    assert [n.name for n in again.program.graph.nodes] == [n.name for n in first.program.graph.nodes]


def test_decisions_of_other_tokens_are_not_used(annotated, ctx, tmp_path):
    file = tmp_path / "winners.json"
    pass_ = RotationSearch(sites=("q_proj",), cache_path=file)
    apply(pass_, annotated, ctx)
    before = json.loads(file.read_text())["key"]
    ctx.tokens = lambda: torch.full((2, 24), 9)
    record = apply(pass_, annotated, ctx).record
    assert "another program" in record.warnings[0]
    assert json.loads(file.read_text())["key"] != before


def test_a_type_that_carries_no_format_is_named(annotated, ctx):
    record = apply(RotationSearch(sites=("q_proj", "w_proj")), annotated, ctx).record
    assert "no w_proj carries a format" in record.warnings[0]


def test_a_model_whose_perplexity_is_not_finite_is_no_ground_for_a_choice(annotated, ctx, monkeypatch):
    monkeypatch.setattr(module, "_perplexity", lambda *given: float("inf"))
    with pytest.raises(ValueError, match=r"rotation-search: the perplexity of the quantized model .* is inf"):
        apply(RotationSearch(sites=("q_proj",)), annotated, ctx)
