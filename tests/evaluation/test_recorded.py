"""Forward passes of many windows: on a GPU a recording of one, with its bits."""

from types import SimpleNamespace

import pytest
import torch

from mxfx.evaluation import recorded
from mxfx.evaluation.recorded import Forward
from mxfx.evaluation.scoring import FloatLogits, score
from mxfx.evaluation.windows import Window
from mxfx.graph.tiny import tiny
from mxfx.graph.trace import trace
from mxfx.runtime.causal_lm import EmittedCausalLM, as_causal_lm
from tests.mixtures import raised_mixture
from tests.programs import RAISE, passed

_IDS = torch.randint(3, 128, (14, 2, 9), generator=torch.Generator().manual_seed(0))


def _model(family: str = "llama-tiny", device: str = "cpu") -> EmittedCausalLM:
    return as_causal_lm(passed(trace(tiny(family)), RAISE), device)


def _on_a_gpu(model: EmittedCausalLM) -> SimpleNamespace:
    return SimpleNamespace(graph=model.graph, device=torch.device("cuda"))


def test_emitted_models_are_recorded_on_a_gpu_but_not_experts_nor_strangers() -> None:
    assert recorded._recordable(_on_a_gpu(_model()))
    assert not recorded._recordable(_on_a_gpu(as_causal_lm(raised_mixture("qwen3_moe"))))
    assert not recorded._recordable(_model())
    assert not recorded._recordable(tiny("llama-tiny"))


def test_shapes_that_come_seldom_run_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.Size] = []
    monkeypatch.setattr(recorded, "_recordable", lambda model: True)
    monkeypatch.setattr(recorded, "_record", lambda model, ids: asked.append(ids.shape))
    model, shapes = _model(), [(2, 9)] * recorded._OFTEN + [(2, 5)] * (recorded._OFTEN - 1)
    forward = Forward(shapes)
    with torch.no_grad():
        for shape in shapes:
            ids = _IDS[0, :, : shape[1]]
            # What cannot be recorded runs as it is, and is tried once.
            assert torch.equal(forward(model, ids), model(ids).logits)
    assert asked == [(2, 9)]


@pytest.mark.cuda
def test_a_recording_has_the_bits_of_single_passes() -> None:
    model = _model(device="cuda")
    forward = Forward([(2, 9)] * len(_IDS))
    with torch.no_grad():
        for ids in _IDS:
            assert torch.equal(forward(model, ids), model(ids.cuda()).logits)
    assert [found is not None for _, found in forward._recorded.values()] == [True]


@pytest.mark.cuda
def test_scores_are_those_of_single_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = _model(device="cuda"), _model("qwen3-tiny", "cuda")
    windows = [Window(row[:-1], row[1:], 0) for ids in _IDS for row in ids]
    found = score(model, windows, reference=FloatLogits(lambda: other))
    monkeypatch.setattr(recorded, "_recordable", lambda model: False)
    single = score(model, windows, reference=FloatLogits(lambda: other))
    assert torch.equal(found[0].loglikelihood, single[0].loglikelihood)
    assert found[0].kl is not None and torch.equal(found[0].kl, single[0].kl)
