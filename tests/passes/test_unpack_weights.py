"""``unpack-weights`` is ``pack-weights`` backwards, to the bit; a CPU's emitted graph holds floats, its file codes."""

from __future__ import annotations

import torch

from mxfx.config import loads
from mxfx.graph.module import build
from mxfx.graph.tiny import tiny
from mxfx.graph.trace import trace
from mxfx.passes import PackWeights, UnpackWeights
from mxfx.pipeline.emit import emitted
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


def _result(device: str = "cpu", **config: object) -> PipelineResult:
    return PassManager().run(trace(tiny("llama-tiny", **config)), loads(_TEXT).completed().emitted(device))


def test_weights_come_back_bit_for_bit() -> None:
    before = _result().before_emit
    back = apply(UnpackWeights(), apply(PackWeights(), before).program).program
    for name, tensor in before.weights.items():
        assert torch.equal(back.weights[name].to(tensor.dtype), tensor), name
    assert not any(back.nodes("mx_linear", "mx_embedding"))


def test_a_cpu_runs_floats_and_saves_codes() -> None:
    result = _result(tie_word_embeddings=True)
    assert any(name.endswith(".codes") for name in result.portable.weights)
    assert not any(name.endswith(".codes") for name in result.program.weights)


def test_of_an_embedding_that_nobody_else_reads_only_rows_are_decoded() -> None:
    result = _result(tie_word_embeddings=False)
    codes = [name for name in result.program.weights if name.endswith(".codes")]
    assert codes == ["model.embed_tokens.weight.codes"]
    ids = torch.arange(3, 25).view(2, 11)
    numbers = apply(UnpackWeights(), result.portable).program
    with torch.no_grad():
        assert torch.equal(build(result.program)(ids), build(emitted(numbers))(ids))


def test_a_gpu_keeps_codes_but_of_matrices_of_transforms() -> None:
    specs = {spec.name: spec.value for spec in loads(_TEXT).completed().emitted("cuda").specs}
    assert "pack-weights" in specs and str(specs["unpack-weights"].select) == "type: mx_decode"
