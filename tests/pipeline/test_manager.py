"""The manager runs passes in order, with instruments nested around them, and says where things fail."""

from __future__ import annotations

import re

import pytest
import torch

from mxfx.config import ConfigError, from_text, loads
from mxfx.config.pipeline import register_passes
from mxfx.graph.execute import execute
from mxfx.pipeline.instruments import Timing
from mxfx.pipeline.manager import Instrument, PassError, PassManager, StopPoint
from mxfx.rewrite import FactError, all_passes, find_pass
from mxfx.rewrite.facts import ANNOTATED, LOWERED, NORMS_FUSED, NORMS_RAISED, RAISED

RAISE = "raise-norm,raise-rope,raise-attention"


class Recorder(Instrument):
    def __init__(self, name, log):
        self.name, self.log = name, log

    def enter(self, run):
        self.log.append(f"{self.name} enter")

    def before(self, step):
        assert step.after is None
        self.log.append(f"{self.name} before {step.index}")

    def after(self, step):
        assert step.after is not None
        self.log.append(f"{self.name} after {step.index}")

    def failed(self, step, error):
        self.log.append(f"{self.name} failed {step.index}")

    def exit(self, run):
        self.log.append(f"{self.name} exit")


def test_instruments_nest_like_brackets(program):
    log: list[str] = []
    PassManager([Recorder("a", log), Recorder("b", log)]).run(program("llama-tiny", "traced"), from_text("raise-norm"))
    assert log == ["a enter", "b enter", "a before 1", "b before 1", "b after 1", "a after 1", "b exit", "a exit"]


def test_a_failure_reaches_every_instrument_and_ends_the_run(program):
    log: list[str] = []
    pipeline = from_text("annotate{rule=[{match=nowhere,weight=mxint4@32}]},insert-fake-quant")
    with pytest.raises(PassError):
        PassManager([Recorder("a", log)]).run(program("llama-tiny", "raised"), pipeline)
    assert log == ["a enter", "a before 1", "a failed 1", "a exit"]


def test_the_source_program_stays_as_it_is(program):
    source = program("llama-tiny", "traced")
    names = [n.name for n in source.graph.nodes]
    PassManager().run(source, from_text(RAISE))
    assert [n.name for n in source.graph.nodes] == names


def test_a_whole_pipeline_gives_every_record(program):
    result = PassManager().run(program("llama-tiny", "traced"), from_text(RAISE))
    assert [(r.name, len(r.matches)) for r in result.records] == [
        ("raise-norm", 5),
        ("raise-rope", 4),
        ("raise-attention", 2),
    ]


def test_an_impossible_order_is_refused_before_anything_runs(program):
    log: list[str] = []
    with pytest.raises(ConfigError, match=r"requires 'annotated'"):
        PassManager([Recorder("a", log)]).run(program("llama-tiny", "traced"), from_text(f"{RAISE},round-weights"))
    assert log == []


def test_an_impossible_order_of_plain_passes_is_refused_too(program):
    with pytest.raises(FactError, match=r"here:7: pass 1: pass 'round-weights' requires 'annotated'"):
        passes = [find_pass("round-weights")()]
        PassManager().run(program("llama-tiny", "raised"), passes, locate=lambda index, option: "here:7")


def test_a_failed_expectation_cites_the_line_of_its_rule(program):
    text = """
[[pass]]
name = "annotate"
  [[pass.rule]]
  match = '.*q_proj'
  weight = "mxint4@32"

  [[pass.rule]]
  match = '.*nowhere'
  weight = "mxint4@32"
"""
    with pytest.raises(
        PassError, match=r"^p\.toml:9:\d+: pass 5 'annotate': annotate rule 2: match '\.\*nowhere' fits no node"
    ):
        PassManager().run(program("llama-tiny", "traced"), loads(text, "p.toml"))


def test_stopping_after_a_match_leaves_the_rest(program):
    result = PassManager().run(program("llama-tiny", "traced"), from_text(RAISE), stop_after=StopPoint.parse("1.2"))
    assert len(result.records) == 1
    assert sum("rms_norm" in n.name for n in result.program.graph.nodes) == 2


@pytest.mark.parametrize("text", ["", "0", "1.", "a", "1.2.3", "-1"])
def test_a_malformed_stop_point_is_refused(text):
    with pytest.raises(ValueError, match=r"stop point"):
        StopPoint.parse(text)


def test_timing_accounts_for_passes_and_instruments(program):
    timing = Timing()
    PassManager([Recorder("a", []), timing]).run(program("llama-tiny", "traced"), from_text(RAISE))
    assert [name for name, _ in timing.passes] == ["1 raise-norm", "2 raise-rope", "3 raise-attention"]
    assert 0 < sum(seconds for _, seconds in timing.passes) <= timing.total
    assert set(timing.instruments) == {"Recorder"}
    assert "raise-rope" in timing.table()


def test_the_result_computes_what_the_source_computes(program):
    source = program("llama-tiny", "traced")
    result = PassManager().run(source, from_text(RAISE))
    ids = torch.arange(20).reshape(2, 10)
    assert torch.equal(execute(result.program, ids), execute(source, ids))


def test_a_pass_whose_work_was_done_before_it_is_no_warning(program):
    """The tutorial's B and C end with passes for what GPTQ left; ``--strict`` must take them."""
    rounded = "annotate{rule=[{match='.*_proj',weight=mxint4@32}]},round-weights,round-weights"
    twice = PassManager().run(program("llama-tiny", "raised"), from_text(rounded)).records[-1]
    assert (len(twice.matches), twice.warnings) == (0, [])
    assert all(skip.done for skip in twice.skips)


def test_a_pass_that_found_nothing_to_work_on_is_a_warning(program):
    unfit = "annotate{rule=[{match='.*_proj',weight=mxint4@32}]},quantize-kv-cache"
    record = PassManager().run(program("llama-tiny", "raised"), from_text(unfit)).records[-1]
    assert [warning.partition(" (")[0] for warning in record.warnings] == ["did nothing: 0 matched, 4 skipped"]


def test_a_select_that_fits_nothing_is_told_with_the_nearest_name(program):
    passes = "annotate{rule=[{match='.*_proj',weight=mxint4@32}]},round-weights{select='.*.mlp.up_porj'}"
    record = PassManager().run(program("llama-tiny", "raised"), from_text(passes)).records[-1]
    said = r"did nothing: select = '.*.mlp.up_porj' fits no node; .* such as 'model\.layers\.\d\.mlp\.up_proj'"
    assert len(record.warnings) == 1 and re.fullmatch(said, record.warnings[0])


@pytest.mark.parametrize(
    ("behind", "left"),
    [
        (
            "",
            ["input of linear .*: no pass behind it does that; add insert-fake-quant", "weight .* add distill or gptq"],
        ),
        (",insert-fake-quant", ["weight of linear .* is not rounded: no pass behind it"]),
        (",insert-fake-quant,round-weights", []),
        (
            ",insert-fake-quant,round-weights{select='.*down_proj'}",
            [r"weight of linear \(.*\.q_proj\) is .*: round-weights behind it leaves that out, by"],
        ),
    ],
)
def test_formats_that_nothing_is_rounded_to_are_warned_of_at_the_end(program, behind: str, left: list[str]):
    passes = "annotate{rule=[{match='.*_proj',weight=mxint4@32,input=mxint4@32}]}" + behind
    run = PassManager().run(program("llama-tiny", "raised"), from_text(passes))
    assert len(run.records[0].warnings) == len(left)
    assert all(re.match(f"the {said}", warning) for said, warning in zip(left, run.records[0].warnings, strict=True))
    stopped = (
        PassManager().run(program("llama-tiny", "raised"), from_text(passes), stop_after=StopPoint.parse("1")).records
    )
    assert stopped[0].warnings == []


def test_no_pass_that_reads_raised_ops_comes_behind_lower():
    """None of them is left there: the pass would find nothing to do, and say so only in a warning."""
    register_passes()
    late = [
        name
        for name, pass_ in all_passes().items()
        if pass_.__module__.startswith("mxfx.passes.")
        and pass_.requires & {RAISED, ANNOTATED, NORMS_RAISED, NORMS_FUSED}
        if LOWERED not in pass_.forbids and name != "raise-attention"
    ]
    assert late == []
