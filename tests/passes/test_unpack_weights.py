"""``unpack-weights`` is ``pack-weights`` backwards, to the bit; a CPU's emitted graph holds floats, its file codes."""

from __future__ import annotations

import torch

from mxfx.config import loads
from mxfx.graph.tiny import tiny
from mxfx.graph.trace import trace
from mxfx.passes import PackWeights, UnpackWeights
from mxfx.pipeline.manager import PassManager, PipelineResult
from mxfx.rewrite import apply

_TEXT = """
[[pass]]
name = "annotate"
  [[pass.rule]]
  match  = '.*_proj|.*embed_tokens|.*lm_head'
  weight = "mxfp4_e2m1@32"
[[pass]]
name = "round-weights"
"""


def _result(device: str = "cpu") -> PipelineResult:
    return PassManager().run(trace(tiny("llama-tiny")), loads(_TEXT).completed().emitted(device))


def test_weights_come_back_bit_for_bit() -> None:
    before = _result().before_emit
    back = apply(UnpackWeights(), apply(PackWeights(), before).program).program
    for name, tensor in before.weights.items():
        assert torch.equal(back.weights[name].to(tensor.dtype), tensor), name
    assert not any(back.nodes("mx_linear", "mx_embedding"))


def test_a_cpu_runs_floats_and_saves_codes() -> None:
    result = _result()
    assert any(name.endswith(".codes") for name in result.portable.weights)
    assert not any(name.endswith(".codes") for name in result.program.weights)


def test_a_gpu_keeps_codes() -> None:
    names = [spec.name for spec in loads(_TEXT).completed().emitted("cuda").specs]
    assert "pack-weights" in names and "unpack-weights" not in names
