"""A format whose scale belongs to a block and to the whole tensor goes through every pass like an MX format."""

from __future__ import annotations

import pytest
import torch

from mxfx.formats import parse
from mxfx.graph.execute import execute
from mxfx.graph.text import parse as parse_text
from mxfx.graph.text import to_text
from mxfx.graph.verify import verify
from mxfx.passes import Annotate, Gptq, InsertFakeQuant, Lower, RoundWeights, Rule
from mxfx.report.coverage import coverage
from mxfx.rewrite import Context, Selector, apply
from mxfx.rewrite.size import bits_per_weight
from tests.programs import raised

FORMATS = ["nvfp4", "nvfp4/four-over-six"]
IDS = torch.randint(3, 128, (3, 17), generator=torch.Generator().manual_seed(0))


def quantized(text: str):
    """llama-tiny with weights and inputs of its linears in a format, rounded to nearest."""
    fmt = parse(text)
    rule = Rule(Selector(r".*_proj"), weight=fmt, input=fmt)
    program = raised("llama-tiny")
    for step in (Annotate(rule=(rule,)), RoundWeights(), InsertFakeQuant()):
        program = apply(step, program).program
    return program


@pytest.mark.parametrize("text", FORMATS)
def test_weights_and_inputs_are_rounded_and_counted(text: str) -> None:
    program = quantized(text)
    verify(program)
    linears = [n for n in program.nodes("linear") if "_proj" in program.weight_of(n)]
    assert len(linears) == 14
    float_program = raised("llama-tiny")
    for node in linears:
        name = program.weight_of(node)
        assert torch.equal(program.weights[name], parse(text).fake_quantize(float_program.weights[name]))
        assert node.args[0].args[1:] == (text, -1)
    report = coverage(program)
    assert sum(gemm.four_bit for gemm in report.gemms) == 14
    assert 4.5 < bits_per_weight(program) < bits_per_weight(float_program)
    again = parse_text(to_text(program), program.weights)
    assert to_text(again) == to_text(program)


@pytest.mark.parametrize("text", FORMATS)
def test_lowering_keeps_the_logits(text: str) -> None:
    program = quantized(text)
    lowered = apply(Lower(), program).program
    assert torch.equal(execute(lowered, IDS), execute(program, IDS))


def test_gptq_lowers_the_loss_against_rounding_to_nearest() -> None:
    fmt = parse("nvfp4")
    program = apply(Annotate(rule=(Rule(Selector(r".*_proj"), weight=fmt, input=fmt),)), raised("llama-tiny")).program
    calibration = torch.randint(3, 128, (8, 32), generator=torch.Generator().manual_seed(5))
    solved = apply(Gptq(samples=8), program, Context(seed=1, tokens=lambda: calibration)).program
    changed = [change for change in solved.weights.ledger if change.pass_name == "gptq"]
    assert len(changed) == 14
    assert not torch.equal(
        solved.weights["model.layers.0.mlp.up_proj.weight"],
        quantized("nvfp4").weights["model.layers.0.mlp.up_proj.weight"],
    )
