"""A product with a stored weight is a linear, however the model spells it; a LayerNorm is a norm."""

from __future__ import annotations

import pytest
import torch
import transformers as T

from mxfx.graph.execute import execute
from mxfx.graph.trace import bind, trace
from mxfx.graph.verify import verify
from mxfx.ops.catalogue import spec
from tests.architectures import build
from tests.programs import relative
from tests.sweep import unseen

#: Falcon multiplies by ``W.T``: a permutation where the trace is made twice, as it is where it is made once (biased).
CONV1D, TURNED, TURNED_ONCE = "gpt2", "falcon", "falcon with linear biases"


def falcon() -> torch.nn.Module:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 131}
    return T.AutoModelForCausalLM.from_config(T.FalconConfig(**sizes, alibi=True, bias=True)).eval()


@pytest.mark.parametrize(("name", "linears"), [(CONV1D, 9), (TURNED, 9), (TURNED_ONCE, 9)])
def test_every_stored_matrix_that_is_multiplied_is_the_weight_of_a_linear(name: str, linears: int) -> None:
    program = trace(falcon() if name == TURNED_ONCE else build(name))
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


def test_a_stored_matrix_on_the_left_is_the_weight_of_a_linear_too() -> None:
    model = build("mamba")
    program = trace(model)
    verify(program)
    assert "backbone.layers.1.mixer.dt_proj.weight" in {program.weight_of(n) for n in program.products()}
    assert not unseen(program)
    ids = torch.randint(3, 128, (2, 9))
    with torch.no_grad():
        assert relative(execute(program, ids), model(ids).logits) < 1e-5
