"""What lets tests share an export: models of one structure and no others."""

from __future__ import annotations

import torch
from torch import nn

from mxfx.graph.text import Printer
from mxfx.graph.tiny import tiny
from mxfx.graph.trace import _skeleton, trace
from tests.exports import _structure, exported_once


def _of(model: nn.Module) -> object:
    return _structure(_skeleton(model, frozenset(), "mxfx"))


def test_models_of_one_structure_share_an_export_and_others_do_not() -> None:
    model = tiny("llama-tiny")
    assert _of(model) == _of(tiny("llama-tiny", dtype=torch.bfloat16)) is not None
    others = [tiny("qwen3-tiny"), *(tiny("llama-tiny") for _ in range(4))]
    others[1].config.rope_parameters["rope_theta"] = 77.0
    others[2].model.layers[1].self_attn.scaling = 0.1
    others[3].model.layers[0].mlp.down_proj = nn.Linear(128, 64, bias=True)
    others[4].model.layers[0].self_attn.k_proj.weight = others[4].model.layers[0].self_attn.v_proj.weight
    assert _of(model) not in [_of(other) for other in others]


def test_a_model_with_code_of_its_own_is_exported_anew() -> None:
    class Mine(nn.Linear): ...

    swapped, hooked, patched = (tiny("llama-tiny") for _ in range(3))
    swapped.model.layers[0].mlp.down_proj = Mine(128, 64)
    hooked.model.norm.register_forward_hook(lambda module, args, out: out * 2)
    patched.model.norm.forward = lambda x: x
    assert [_of(model) for model in (swapped, hooked, patched)] == [None, None, None]


def test_a_shared_export_gives_the_program_that_its_own_gives() -> None:
    said = []
    for wanted in (False, True, True):
        with exported_once(lambda wanted=wanted: wanted):
            said.append(str(Printer().print(trace(tiny("llama-tiny")))))
    assert said[0] == said[1] == said[2]
