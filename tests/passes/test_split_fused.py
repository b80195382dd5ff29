"""``split-fused``: parts of fused projections become linears of their own, whatever their layout; no number changes."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

from mxfx.compat import load_any
from mxfx.formats import parse
from mxfx.graph.program import Program
from mxfx.graph.trace import trace
from mxfx.passes import Annotate, Rule, SplitFused
from mxfx.pipeline.manager import PassManager
from mxfx.rewrite import Selector, apply
from mxfx.rewrite.parts import parts, whole
from mxfx.rewrite.roles import role_of
from mxfx.rewrite.size import inner, multiplied, share_in_format
from tests.architectures import build
from tests.programs import RAISE, passed, relative, traced
from tests.programs import raised as of_family

CONFIGS = Path(__file__).parents[2] / "passes_configs"
QKV = ["q_proj", "k_proj", "v_proj"]
#: Architecture → roles of its last layer's products: fused in a row, by heads of three, with one key for all, Conv1D.
FUSED = {
    "phi3": [*QKV, "o_proj", "gate_proj", "up_proj", "down_proj"],
    "glm": [*QKV, "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt_neox": [*QKV, "o_proj", "up_proj", "down_proj"],
    "gpt_bigcode": [*QKV, "o_proj", "up_proj", "down_proj"],
    "gpt2": [*QKV, "o_proj", "up_proj", "down_proj"],
}


@cache
def raised(name: str) -> Program:
    return passed(trace(build(name).double()).twin(torch.float64), RAISE)


@pytest.mark.parametrize("name", FUSED)
def test_every_role_gets_a_product_and_no_number_changes(name: str, preserved, logits) -> None:
    before = raised(name)
    after, record = preserved(SplitFused(), before)
    assert record.skips == []
    layer = [n for n in after.products() if role_of(n) != "head"]
    assert [role_of(n) for n in layer[len(layer) // 2 :]] == FUSED[name]
    assert relative(logits(after), logits(before)) < 1e-14


@pytest.mark.parametrize("name", FUSED)
def test_a_fused_weight_can_be_put_together_again(name: str) -> None:
    before = raised(name)
    after = apply(SplitFused(), before).program
    assert parts(after)
    for source in parts(after):
        assert source not in after.weights
        assert torch.equal(whole(after, source), before.weights[source])


def test_the_fused_module_s_name_still_names_all_its_parts() -> None:
    split = apply(SplitFused(), of_family("phi3-tiny")).program
    rule = Rule(Selector(r".*\.1\.self_attn\.qkv_proj"), weight=parse("mxint4@32"))
    found = {match.path.rpartition(".")[2] for match in apply(Annotate((rule,), partial=True), split).record.matches}
    assert found == set(QKV)
    without = Rule(Selector(r".*_proj"), except_=r".*\.qkv_proj", weight=parse("mxint4@32"))
    taken = apply(Annotate((without,), partial=True), split).record.matches
    assert not any(match.path.endswith(tuple(QKV)) for match in taken)


def test_the_tutorial_s_configuration_a_takes_every_weight_of_fused_projections() -> None:
    result = PassManager().run(traced("phi3-tiny"), load_any(CONFIGS / "tutorial_a_rtn.toml"))
    assert share_in_format(inner(multiplied(result.program))) == 1.0
    assert not any(record.warnings for record in result.records)


def test_fused_experts_stay_together() -> None:
    from tests.mixtures import raised_mixture

    record = apply(SplitFused(), raised_mixture("mixtral")).record
    assert record.matches == []
    assert {skip.reason for skip in record.skips} == {"the weight is a stack of matrices: its parts stay together"}
