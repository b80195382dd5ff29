"""For each linear of an emitted program, how it runs and why not faster; and the same before it is emitted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mxfx.config import EmitConfig, Pipeline
from mxfx.formats import parse
from mxfx.graph.tiny import tiny
from mxfx.graph.trace import trace
from mxfx.ops.kernels import ways
from mxfx.passes import Annotate, InsertFakeQuant, RoundWeights, Rule
from mxfx.pipeline.manager import PassManager, PipelineResult
from mxfx.report.linears import Linear, linear_lines, linears_of, planned_linears
from mxfx.rewrite import Context, Selector

_WIDE = "a GEMM in bfloat16, the weight decoded before"


def _run(weight: str, x: str | None, device: str = "cuda", **how: str) -> tuple[PipelineResult, list[Linear]]:
    """The tiny model emitted, and what was foreseen of it."""
    rule = Rule(Selector(r"model\..*_proj"), weight=parse(weight), input=None if x is None else parse(x))
    head = [Annotate(rule=(rule,)), RoundWeights(), *([] if x is None else [InsertFakeQuant()])]
    pipeline = Pipeline(head, emit=EmitConfig(device=device, **how)).completed().emitted(device)  # type: ignore[arg-type]
    program = trace(tiny("llama-tiny", dtype=torch.bfloat16))
    annotated = PassManager().run(program, Pipeline(head[:1]).completed()).program
    planned = planned_linears(annotated, device, how.get("sums", "exact"), packs=True)
    return PassManager().run(program, pipeline, Context(device=torch.device("cpu"))), planned


@pytest.mark.parametrize(
    ("weight", "x", "how", "last", "why"),
    [
        ("mxint4@32", "mxint4@32", {}, ways.EXACT, ""),
        ("mxint4@32", "mxint4@32", {"sums": "fast"}, ways.FAST, ""),
        ("mxint4@16", "mxint4@16", {}, _WIDE, "FP8 does not sum mxint4@16 by mxint4@16 exactly"),
        ("mxint4@32", None, {}, _WIDE, "its input is read unrounded"),
        ("mxint8@32", "mxint8@32", {}, _WIDE, "its input is mxint8@32, of which E4M3 does not hold the significant"),
    ],
)
def test_every_linear_says_how_it_runs_on_a_gpu_and_why(
    weight: str, x: str | None, how: dict[str, str], last: str, why: str
) -> None:
    result, planned = _run(weight, x, **how)
    found = linears_of(result.program, result.steps)
    assert sum(one.count for one in found) == 2 * 7 + 1
    (head,) = (one for one in found if one.path == "lm_head")
    assert head.weight == "bfloat16" and head.why == "its weight has no format"
    for one in found:
        if one is not head:
            assert (one.weight, one.input) == (weight, x or "") and one.path.startswith("model.layers.*.")
            assert one.ways[-1] == (None, last) and one.why.startswith(why) and bool(one.why) == bool(why)
    assert {one.path: one for one in planned} == {one.path: one for one in found}


def test_on_a_cpu_what_no_kernel_multiplies_was_unpacked_and_says_so() -> None:
    result, _ = _run("mxint8@32", "mxint8@32", "cpu")
    found = [one for one in linears_of(result.program, result.steps) if one.path != "lm_head"]
    assert {(one.weight, one.why) for one in found} == {("bfloat16", "no kernel of this machine multiplies its codes")}


def test_a_weight_off_its_grid_says_why_it_is_not_packed() -> None:
    rule = Rule(Selector(r"model\..*_proj"), weight=parse("mxint4@32"))
    pipeline = Pipeline([Annotate(rule=(rule,))], emit=EmitConfig(device="cuda")).completed().emitted("cuda")
    result = PassManager().run(trace(tiny("llama-tiny")), pipeline)
    found = [one for one in linears_of(result.program, result.steps) if one.path != "lm_head"]
    assert {one.why for one in found} == {"its weight is not rounded to mxint4@32 yet"}


def test_those_that_run_alike_are_one_line() -> None:
    result, _ = _run("mxint4@32", "mxint4@32")
    lines = list(linear_lines(linears_of(result.program, result.steps)))
    assert "linears: 1 lm_head, bfloat16: a GEMM in bfloat16 (its weight has no format)" in lines
    assert sum(int(line.split()[1]) for line in lines) == 15
    assert all("FP8 tensor cores, exact sums" in line for line in lines if "lm_head" not in line)


def test_a_program_that_nobody_lowered_has_none() -> None:
    result = PassManager().run(trace(tiny("llama-tiny")), Pipeline([]).completed())
    assert linears_of(result.program, result.steps) == []


def test_of_two_phases_each_has_its_own_reasons() -> None:
    result, _ = _run("mxint4@32", "mxint4@32")
    other = [replace(step, phase="decode") for step in _run("mxint4@32", "mxint8@32")[0].steps]
    mine = [replace(step, phase="prefill") for step in result.steps]
    (one, *_) = linears_of(result.program, [*mine, *other])
    assert one.why == "" and one.ways[-1] == (None, ways.EXACT)
