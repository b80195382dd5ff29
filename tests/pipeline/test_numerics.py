"""Promises about numbers are held; a broken one stops the run and names the pass and the node."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from mxfx.config import from_text
from mxfx.config.pipeline import BudgetConfig, Pipeline
from mxfx.graph.verify import VerifyError
from mxfx.pipeline.bisect import NothingFound, bisect
from mxfx.pipeline.instruments import BudgetError, Ledger, Numbers, NumericsError, Verify
from mxfx.pipeline.manager import PassManager
from mxfx.report.passes import lost
from mxfx.rewrite import Close, Exact, Local, Lossy, Pass
from mxfx.rewrite.pass_ import _REGISTRY, register

QUANTIZE = (
    "annotate{rule=[{match='.*_proj',weight=mxint4@32,input=mxint4@32},{match='.*self_attn',kv=mxint4@16}]},"
    "insert-fake-quant,quantize-kv-cache,round-weights"
)


@dataclass(frozen=True)
class FoldTwice(Pass):
    """Fold the gain of each norm into its readers twice: wrong, and no shape shows it."""

    name: ClassVar[str] = "fold-twice"
    numerics: ClassVar = Close(1e-9)

    def run(self, rw, ctx):
        for norm in rw.program.nodes("rms_norm"):
            if not isinstance(norm.args[1], torch.fx.Node) or not rw.match(norm):
                continue
            gain = rw.weights.master(str(norm.args[1].target))
            for reader in norm.users:
                name = str(reader.args[1].target)
                if name != "lm_head.weight":
                    rw.set_weight(name, rw.weights.master(name) * gain * gain)
            norm.update_arg(1, None)
            rw.touch(norm)


@dataclass(frozen=True)
class Nudge(Pass):
    """Scale one weight by a hair."""

    name: ClassVar[str] = "nudge"
    numerics: ClassVar = Exact()
    by: float = 1e-3

    def run(self, rw, ctx):
        name = "model.layers.0.mlp.up_proj.weight"
        if rw.match(next(rw.program.nodes("linear"))):
            rw.set_weight(name, rw.weights.master(name) * (1 + self.by))


@dataclass(frozen=True)
class NudgeClose(Nudge):
    name: ClassVar[str] = "nudge-close"
    numerics: ClassVar = Close(1e-9)


@dataclass(frozen=True)
class NudgeLocal(Nudge):
    name: ClassVar[str] = "nudge-local"
    numerics: ClassVar = Local(1e-2)


@dataclass(frozen=True)
class Unrecorded(Pass):
    """Change the ε of a norm behind the Rewriter's back, which then counts nothing as touched."""

    name: ClassVar[str] = "unrecorded"
    numerics: ClassVar = Exact()

    def run(self, rw, ctx):
        next(rw.program.nodes("rms_norm")).update_arg(2, 0.5)


@dataclass(frozen=True)
class InPlace(Pass):
    """Write a weight that the program before shares."""

    name: ClassVar[str] = "in-place"
    numerics: ClassVar = Lossy()

    def run(self, rw, ctx):
        rw.weights["model.layers.0.mlp.up_proj.weight"].mul_(1.0)


@dataclass(frozen=True)
class Same(Pass):
    """Records a node as touched, and leaves it."""

    name: ClassVar[str] = "same"
    numerics: ClassVar = Close(1e-9)

    def run(self, rw, ctx):
        rw.touch(next(rw.program.nodes("linear")))


@pytest.fixture(autouse=True)
def plugged_in():
    """The wrong passes are registered as a plug-in would be, for one test."""
    known = dict(_REGISTRY)
    for cls in (FoldTwice, Nudge, NudgeClose, NudgeLocal):
        register(cls)
    yield
    _REGISTRY.clear()
    _REGISTRY.update(known)


def test_a_gain_folded_twice_breaks_close_and_is_named(program):
    with pytest.raises(
        NumericsError,
        match=r"pass 1 'fold-twice'.* first difference: linear = aten.linear.default in model.layers.0.self_attn",
    ):
        PassManager([Numbers()]).run(program("llama-tiny", "raised"), [FoldTwice()])


def test_bisect_finds_the_gain_folded_twice(program):
    pipeline = from_text("annotate{rule=[{match='.*_proj',weight=mxint8@32}]},fold-twice,round-weights")
    found = bisect(program("llama-tiny", "raised"), pipeline, max_kl=1e-3, source="llama-tiny")
    assert found.pass_.name == "fold-twice"
    assert found.match is not None and found.match.path == "model.layers.0.input_layernorm"
    assert found.commands[0].endswith("--stop-after 2.0") and found.commands[1].endswith("--stop-after 2.1")
    assert found.kl_good <= 1e-3 < found.kl_bad


def test_bisect_points_inside_a_lossy_pass(program):
    source = program("llama-tiny", "raised")
    found = bisect(source, from_text(QUANTIZE), max_kl=0.05)
    assert found.bad.number == 4 and found.match is not None and found.match.index == found.bad.match
    assert found.good.match == found.bad.match - 1


def test_bisect_says_so_if_nothing_is_lost(program):
    with pytest.raises(NothingFound, match=r"within 0.05"):
        bisect(program("llama-tiny", "raised"), from_text("annotate{rule=[{match='.*_proj',weight=mxint8@32}]}"))


def test_a_weight_changed_by_an_exact_pass_is_caught(program):
    with pytest.raises(NumericsError, match=r"bit-equal .* first difference: linear_5 = aten.linear.default"):
        PassManager([Numbers()]).run(program("llama-tiny", "raised"), [Nudge()])


def test_close_is_held_on_the_float64_twin_to_its_tolerance(program):
    manager = PassManager([Numbers()])
    result = manager.run(program("llama-tiny", "raised"), [NudgeClose(by=1e-12)])
    assert 0 < result.steps[0].findings["numerics"]["error"] < 1e-9
    with pytest.raises(NumericsError, match=r"float64 twin"):
        manager.run(program("llama-tiny", "raised"), [NudgeClose(by=1e-7)])


def test_a_scale_of_the_whole_tensor_that_moves_by_a_hair_flips_no_code(program):
    """NVFP4's: every rounded number then moves with it, and the lowered Hadamard matrix rounds otherwise."""
    rotated = "annotate{rule=[{match='.*_proj',input=nvfp4}]},transform-inputs,insert-fake-quant,lower"
    result = PassManager([Numbers()]).run(program("llama-tiny", "raised"), from_text(rotated))
    assert result.steps[-1].findings["numerics"]["flipped"] <= 20


def test_a_change_that_no_record_tells_of_is_caught_too(program):
    with pytest.raises(NumericsError, match=r"'unrecorded' promises bit-equal"):
        PassManager([Numbers()]).run(program("llama-tiny", "raised"), [Unrecorded()])


def test_a_weight_written_in_place_is_named(program):
    source = program("llama-tiny", "raised")
    own = source.copy()
    own.weights = own.weights.cast(torch.float64).cast(torch.float32)
    with pytest.raises(VerifyError, match=r"'in-place' wrote weight 'model.layers.0.mlp.up_proj.weight' in place"):
        PassManager([Verify()]).run(own, [InPlace()])


def test_the_same_calls_are_not_run_on_a_twin(program, monkeypatch):
    monkeypatch.setattr("mxfx.pipeline.instruments.numerics.execute", None)
    found = PassManager([Numbers()]).run(program("llama-tiny", "raised"), [Same()]).steps[0].findings
    assert found["numerics"] == {"promise": "close", "error": 0.0}


def test_local_compares_region_by_region(program):
    manager = PassManager([Numbers()])
    result = manager.run(program("llama-tiny", "quantized"), [NudgeLocal(by=1e-3)])
    found = result.steps[0].findings["numerics"]
    assert found["at"] == "linear_5" and found["error"] == pytest.approx(1e-3, rel=1e-2)
    with pytest.raises(NumericsError, match=r"linear_5 = aten.linear.default in model.layers.0.mlp.up_proj"):
        manager.run(program("llama-tiny", "quantized"), [NudgeLocal(by=0.1)])


def test_lowering_a_quantized_program_flips_no_code(program):
    found = (
        PassManager([Numbers()])
        .run(program("llama-tiny", "quantized"), from_text("lower"))
        .steps[0]
        .findings["numerics"]
    )
    assert found["codes"] > 10_000 and found["flipped"] == 0 and found["regions"] > 50


def test_what_is_not_checked_is_said(program):
    result = PassManager([Numbers(max_parameters=10)]).run(program("llama-tiny", "raised"), [NudgeClose()])
    assert "checked up to 10 unless asked" in result.steps[0].findings["numerics"]["unchecked"]


@pytest.mark.parametrize("family", ["llama-tiny", "qwen2-tiny", "gemma-tiny"])
def test_the_passes_of_a_pipeline_keep_their_promises(program, family):
    pipeline = from_text(f"raise-norm,raise-rope,raise-attention,{QUANTIZE},lower")
    result = PassManager([Numbers(), Verify()]).run(program(family, "traced"), pipeline)
    assert "lowered" in result.program.facts


def test_the_ledger_says_what_each_lossy_pass_costs(program):
    result = PassManager([Ledger()]).run(program("llama-tiny", "raised"), from_text(QUANTIZE))
    ledgers = [s.findings["ledger"] for s in result.steps if isinstance(s.pass_.numerics, Lossy)]
    assert [entry["kl"] for entry in ledgers] == sorted(entry["kl"] for entry in ledgers)
    assert set(ledgers[-1]["layers"]) == {"0", "1"}
    assert {"0/q_proj", "1/down_proj", "1/attention"} <= set(ledgers[-1]["operands"])
    assert 0 < ledgers[-1]["sqnr"] < 40 and ledgers[-1]["ppl_ratio"] > 0


def test_the_ledger_does_not_call_what_is_not_finite_equal(program):
    @dataclass(frozen=True)
    class Break(Pass):
        """What layer 1 reads is NaN."""

        name: ClassVar[str] = "break"
        numerics: ClassVar = Lossy()

        def run(self, rw, ctx):
            rw.match(next(rw.program.nodes("linear")))
            name = "model.layers.0.mlp.up_proj.weight"
            rw.set_weight(name, rw.weights.master(name) * math.nan)

    (step,) = PassManager([Ledger()]).run(program("llama-tiny", "raised"), [Break()]).steps
    found = step.findings["ledger"]
    assert found["operands"]["0/up_proj"] == found["layers"]["1"] == found["sqnr"] == "not finite"
    assert found["operands"]["0/q_proj"] is None
    assert lost(step.findings) == ("nan", "not finite")


def test_a_budget_stops_the_run_at_the_pass_that_exceeds_it(program):
    with pytest.raises(BudgetError, match=r"pass 2 'insert-fake-quant'.* leaves kl .* max_kl = 0.001"):
        PassManager([Ledger(BudgetConfig(max_kl=0.001))]).run(program("llama-tiny", "raised"), from_text(QUANTIZE))


def test_a_pass_that_breaks_the_graph_is_named_by_the_verifier(program):
    @dataclass(frozen=True)
    class Break(Pass):
        name: ClassVar[str] = "break"
        numerics: ClassVar = Lossy()

        def run(self, rw, ctx):
            linear = next(rw.program.nodes("linear"))
            linear.meta["val"] = linear.args[1].meta["val"]
            rw.touch(linear)

    with pytest.raises(VerifyError, match=r"pass 1 'break' left a broken program: linear = aten.linear.default"):
        PassManager([Verify()]).run(program("llama-tiny", "raised"), [Break()])


def test_a_pipeline_of_values_works_like_text(program):
    result = PassManager([Numbers()]).run(program("llama-tiny", "raised"), Pipeline([NudgeClose(by=0.0)]))
    assert result.steps[0].findings["numerics"]["error"] == 0.0
