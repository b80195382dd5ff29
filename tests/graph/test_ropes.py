"""RoPE of every type, below and above the length at which some change: the bits of Hugging Face, with a cache too."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from mxfx.config import Pipeline
from mxfx.graph.execute import execute
from mxfx.graph.program import Program
from mxfx.graph.prove import prove
from mxfx.graph.tiny import tiny
from mxfx.graph.trace import trace
from mxfx.pipeline.manager import PassManager
from mxfx.runtime.causal_lm import as_causal_lm
from tests.programs import RAISE, passed

_FACTORS = {"short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [2.0 + 0.3 * i for i in range(8)]}
_CHANGE, _END = 16, 32
#: Type → what it needs beside a base and an original length, and whether its frequencies depend on the length.
TYPES = {
    "dynamic": ({"factor": 2.0}, True),
    "longrope": ({"factor": 4.0, **_FACTORS}, True),
    "yarn": ({"factor": 2.0}, False),
    "linear": ({"factor": 2.0}, False),
    "llama3": ({"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}, False),
}


@cache
def model(kind: str) -> nn.Module:
    rope = {"rope_type": kind, "rope_theta": 1e4, "original_max_position_embeddings": _CHANGE, **TYPES[kind][0]}
    end = _CHANGE if kind == "dynamic" else _END
    return tiny("llama-tiny", rope_parameters=rope, max_position_embeddings=end)


@cache
def traced(kind: str) -> Program:
    return trace(model(kind))


def reference(kind: str, ids: Tensor, mask: Tensor) -> Tensor:
    """A fresh copy's logits: transformers remembers the longest text."""
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        return copy.deepcopy(model(kind))(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("tokens", [_CHANGE - 1, _CHANGE, _CHANGE + 1, _END])
@pytest.mark.parametrize("padding", [0, 2])
def test_logits_are_hugging_face_s_on_both_sides_of_the_change(kind: str, tokens: int, padding: int) -> None:
    ids = torch.randint(3, 128, (2, tokens), generator=torch.Generator().manual_seed(tokens))
    mask = torch.ones_like(ids)
    mask[:, :padding] = 0
    raised = passed(traced(kind), RAISE)
    real = mask.bool()
    assert torch.equal(execute(raised, ids, None, mask)[real], reference(kind, ids, mask)[real])
    assert len(list(raised.nodes("rope"))) == 4
    assert any(raised.nodes("length")) == TYPES[kind][1]


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_the_proof_goes_beyond_the_change_and_the_model_forgets_it(kind: str) -> None:
    hf = copy.deepcopy(model(kind))
    rope = hf.model.rotary_emb
    before, buffers, values = dict(vars(rope)), dict(rope._buffers), copy.deepcopy(rope._buffers)
    assert prove(trace(hf, proven=False), hf).lengths[1] > _CHANGE
    assert vars(rope) == before and all(rope._buffers[name] is buffers[name] for name in buffers)
    assert all(torch.equal(rope._buffers[name], values[name]) for name in values)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_table_of_another_length_is_seen(kind: str) -> None:
    """The mutation: the frequencies of the original length are kept."""
    program = traced(kind).copy()
    (switch,) = [n for n in program.graph.nodes if n.target is torch.ops.aten.where.self and n.meta["val"].dim() == 1]
    switch.replace_all_uses_with(switch.args[2])
    ids = torch.randint(3, 128, (2, _CHANGE + 1))
    mask = torch.ones_like(ids)
    assert not torch.allclose(execute(program, ids), reference(kind, ids, mask), rtol=1e-3)


def greedy(kind: str, ids: Tensor) -> tuple[Tensor, Tensor]:
    """What transformers writes from ids to ``_END``, and what an emitted model writes."""
    given = {"max_new_tokens": _END - ids.shape[1], "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = copy.deepcopy(model(kind)).generate(ids, use_cache=kind == "dynamic", **given)
    written = as_causal_lm(PassManager().run(traced(kind), Pipeline([]).completed()).program)
    assert written.specs
    return expected, written.generate(ids, **given)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_text_written_with_a_cache_crosses_the_change(kind: str) -> None:
    """``dynamic`` turns new keys by the length so far, as transformers; at longrope's switch the text is read again."""
    expected, written = greedy(
        kind, torch.randint(3, 128, (2, _CHANGE - 4), generator=torch.Generator().manual_seed(1))
    )
    assert torch.equal(written, expected)
