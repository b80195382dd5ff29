"""A product with a stored weight is a linear, however the model spells it; a LayerNorm is a norm."""

from __future__ import annotations

import pytest
import torch

from mxfx.graph.errors import TraceError
from mxfx.graph.execute import execute
from mxfx.graph.tiny import tiny
from mxfx.graph.trace import bind, trace
from mxfx.graph.verify import verify
from mxfx.ops.catalogue import spec
from tests.architectures import build
from tests.programs import relative

CONV1D, TURNED = "gpt2", "falcon"


@pytest.mark.parametrize(("name", "linears"), [(CONV1D, 9), (TURNED, 9)])
def test_every_stored_matrix_that_is_multiplied_is_the_weight_of_a_linear(name: str, linears: int) -> None:
    model = build(name)
    program = trace(model)
    verify(program)
    found = [n for n in program.graph.nodes if spec(n).product is not None]
    assert len(found) == linears and {spec(n).concept for n in found} == {"linear"}
    products = (torch.ops.aten.addmm.default, torch.ops.aten.mm.default)
    assert not any(n.target in products for n in program.graph.nodes)
    assert next(spec(n).carries for n in program.nodes("layer_norm")) == ("weight", "input", "output")


def test_a_weight_stored_the_other_way_round_shares_its_memory_and_binds() -> None:
    model = build(CONV1D)
    program = trace(model)
    name = "transformer.h.0.mlp.c_fc.weight"
    assert program.weights[f"{name}.mT"].data_ptr() == model.get_parameter(name).data_ptr()
    with torch.device("meta"):
        empty = type(model)(model.config)
    ids = torch.randint(3, 128, (2, 9))
    with torch.no_grad():
        assert relative(execute(bind(trace(empty), model), ids), model(ids).logits) < 1e-6


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("dynamic", {"factor": 2.0}),
        ("longrope", {"factor": 4.0, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}),
    ],
)
def test_frequencies_that_depend_on_the_length_are_refused_by_their_type(kind: str, more: dict) -> None:
    rope = {"rope_type": kind, "rope_theta": 1e4, "original_max_position_embeddings": 16, **more}
    with pytest.raises(TraceError, match=f"model.rotary_emb.*RoPE of type '{kind}' depends on the length"):
        trace(tiny("llama-tiny", rope_parameters=rope, max_position_embeddings=32))
