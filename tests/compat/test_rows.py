"""Rows of the list of what users of the dialect need, end to end: each test does what its row says."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import mxfx  # noqa: F401  (the Auto classes open what it saves)
from mxfx.compat import load_quant_config, quantize_module_transform_pass
from mxfx.export.folder import MxfxForCausalLM
from mxfx.runtime.causal_lm import EmittedCausalLM
from tests.local_model import save_model, save_texts

CONFIG_A = Path(__file__).parents[2] / "passes_configs" / "tutorial_a_rtn.toml"
IDS = torch.arange(3, 20)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def model(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


class TestRow17SavePretrained:
    @pytest.fixture
    def emitted(self, model: PreTrainedModel) -> MxfxForCausalLM:
        return quantize_module_transform_pass(model, load_quant_config(CONFIG_A))[0]

    def test_the_folder_opens_as_what_was_saved(
        self, model: PreTrainedModel, emitted: MxfxForCausalLM, tmp_path: Path
    ) -> None:
        emitted.save_pretrained(tmp_path / "saved")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        assert torch.equal(logits(again), logits(emitted))
        assert (logits(again) - logits(model)).norm() > 0.01 * logits(model).norm()
        assert [emitted.generate(IDS, max_new_tokens=5).tolist()] == [again.generate(IDS, max_new_tokens=5).tolist()]

    def test_moved_to_a_device_of_another_type_it_is_emitted_for_that(
        self, emitted: MxfxForCausalLM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before, graph = logits(emitted), emitted.graph
        assert emitted.to("cpu").graph is graph
        with monkeypatch.context() as no_gpu_here:
            no_gpu_here.setattr(EmittedCausalLM, "to", lambda self, *args, **kwargs: self)
            for_cuda = emitted.to("cuda").graph
            assert for_cuda is not graph and emitted.cuda(0).graph is for_cuda
        assert emitted.cpu().graph is not for_cuda
        assert torch.equal(logits(emitted), before)
