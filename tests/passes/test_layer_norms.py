"""What LayerNorm asks of the passes over norms and residuals: gain and bias folded, the mean gone, then a rotation."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch

from mxfx.export.errors import ExportError
from mxfx.export.plain import plain
from mxfx.graph.execute import execute
from mxfx.graph.node import path_of
from mxfx.graph.program import Program
from mxfx.graph.trace import trace
from mxfx.ops.catalogue import spec
from mxfx.passes import CenterResidual, FuseNorm, RotateResidual, TransformInputs
from mxfx.rewrite import Pass, PassRecord, apply
from tests.architectures import build
from tests.programs import RAISE, padded_batch, passed

Preserved = Callable[[Pass, Program], tuple[Program, PassRecord]]

#: Model → norms; parallel blocks have one a layer, biases or none, positions that are learned, a gain less 1.
BIASED = {"opt": 5, "gpt_neox": 5, "starcoder2": 5, "gpt2": 5, "nemotron": 5, "falcon": 3, "phi": 3}
PLAIN = {"cohere": 3, "olmo": 5}


@cache
def traced(name: str) -> Program:
    return trace(build(name), proven=False)


@cache
def raised(name: str) -> Program:
    return passed(traced(name), RAISE).twin(torch.float64)


@pytest.mark.parametrize("name", ["opt", "nemotron", "olmo"])
def test_raising_changes_no_bit(name: str) -> None:
    ids, mask, _ = padded_batch()
    after = passed(traced(name), RAISE)
    assert len(list(after.nodes("layer_norm"))) == {**BIASED, **PLAIN}[name]
    assert not any(n.target is torch.ops.aten.layer_norm.default for n in after.graph.nodes)
    assert torch.equal(execute(after, ids, None, mask), execute(traced(name), ids, None, mask))


@pytest.mark.parametrize("name", [*BIASED, *PLAIN])
def test_gain_bias_and_mean_go_and_the_residual_turns(name: str, preserved: Preserved) -> None:
    program, fused = preserved(FuseNorm(), raised(name))
    assert len(fused.matches) == (0 if name == "olmo" else {**BIASED, **PLAIN}[name])
    assert all(spec(n).get("weight") is spec(n).get("bias") is None for n in program.nodes("layer_norm"))
    _, refused = preserved(RotateResidual(), program)
    assert not refused.matches and "center-residual" in refused.skips[0].reason
    program, centred = preserved(CenterResidual(), program)
    assert len(centred.matches) == 1 and not list(program.nodes("layer_norm"))
    means = [program.weights[program.weight_of(n)].mean(1).abs().max() for n in program.nodes("embedding")]
    assert max(means) < 1e-12
    program, turned = preserved(RotateResidual(block=16), program)
    assert len(turned.matches) == 1
    _, inputs = preserved(TransformInputs(block=16), program)
    assert inputs.matches


def test_a_linear_without_a_bias_gains_one_and_the_record_says_so(preserved: Preserved) -> None:
    program, record = preserved(FuseNorm(), raised("gpt2"))
    head = list(program.nodes("linear"))[-1]
    assert spec(head).node_of("bias").target == "lm_head.bias"
    assert record.matches[-1].note == "into lm_head; a bias is new in lm_head"


def test_a_bias_without_a_place_in_the_source_model_is_not_exported() -> None:
    program = apply(FuseNorm(), raised("opt")).program
    with pytest.raises(ExportError, match=r"lm_head adds lm_head\.bias, for which the source model has no place"):
        plain(program)


def test_the_mean_of_an_rms_norm_s_residual_is_left_alone_and_that_is_no_idle_pass(preserved: Preserved) -> None:
    _, record = preserved(CenterResidual(), apply(FuseNorm(), passed(trace(build("llama")), RAISE)).program)
    assert not record.matches and [s.done for s in record.skips] == [True]


def test_a_norm_that_kept_its_bias_keeps_the_mean_of_the_stream(preserved: Preserved) -> None:
    fused = apply(FuseNorm(), raised("bloom")).program
    _, record = preserved(CenterResidual(), fused)
    assert not record.matches
    assert "word_embeddings_layernorm has a bias" in record.skips[0].reason


def test_norms_of_heads_keep_their_mean(preserved: Preserved) -> None:
    program, record = preserved(CenterResidual(), apply(FuseNorm(), raised("persimmon")).program)
    left = {path_of(n).rsplit(".", 1)[-1] for n in program.nodes("layer_norm")}
    assert len(record.matches) == 1 and left == {"q_layernorm", "k_layernorm"}
