"""Rows of the list of what users of the dialect need, end to end: each test does what its row says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import mxfx  # noqa: F401  (the Auto classes open what it saves)
from mxfx.calibration.datasets import DatasetError
from mxfx.compat import load_any, load_quant_config, quantize_module_transform_pass
from mxfx.compat.table import DialectWarning
from mxfx.driver.check import check
from mxfx.export.folder import MxfxForCausalLM
from mxfx.graph.tiny import tiny
from mxfx.pipeline.manager import PassManager, StepResult
from mxfx.rewrite import PassRecord
from mxfx.runtime.causal_lm import EmittedCausalLM
from tests.local_model import save_model
from tests.reference.mase_hooks import rotated_mxint

CONFIG_A = Path(__file__).parents[2] / "passes_configs" / "tutorial_a_rtn.toml"
IDS = torch.arange(3, 20)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def model(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


LINEARS = """
['model\\.layers\\.\\d+\\.(self_attn|mlp)\\.(q|k|v|o|gate|up|down)_proj']
name = "mxint"
weight_block_size = 32
weight_width = 4
data_in_block_size = 32
data_in_width = WIDTH
gptq = true
"""
GPTQ = """
by = "regex_name"
[gptq]
format = "mxint"
dataset = "file:gptq.pt"
nsamples = 4
seqlen = 16
cali_batch_size = 4
checkpoint_dir = "kept"
KEYS
[gptq.weight_config]
weight_block_size = 32
weight_width = 4
"""
SELF = r"['model\.layers\.\d+\.self_attn$'"
CACHE = f"{SELF}]\nname = 'mxint'\n{SELF}.kv_cache]\ndata_in_block_size = 16\ndata_in_width = BITS\n" + "".join(
    f"{SELF}.{stage}]\nbypass = true\n" for stage in ("qk_matmul", "av_matmul", "softmax", "rope")
)
SEARCH = """
[rotation_search]
calib_data = "file:search.pt"
calib_nsamples = 3
calib_seqlen = 24
matmul_types = ["q_proj", "down_proj"]
"""


@pytest.fixture
def compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[MxfxForCausalLM, dict[str, PassRecord]]]:
    """Compiles a text of the dialect in a folder that holds two collected sets; gives what each pass did."""
    monkeypatch.chdir(tmp_path)
    for name, seed, shape in (("gptq", 0, (4, 16)), ("search", 1, (3, 24))):
        ids = torch.randint(3, 128, shape, generator=torch.Generator().manual_seed(seed))
        torch.save({"loader": [(row[None], row[None]) for row in ids]}, f"{name}.pt")
    kept: list[StepResult] = []
    run = PassManager.run

    def remember(self, *args, **kwargs):
        result = run(self, *args, **kwargs)
        kept.extend(result.steps)
        return result

    monkeypatch.setattr(PassManager, "run", remember)

    def compile_(text: str, width: int = 4, keys: str = "") -> tuple[MxfxForCausalLM, dict[str, PassRecord]]:
        Path("c.toml").write_text(text.replace("WIDTH", str(width)).replace("KEYS", keys))
        kept.clear()
        emitted, _ = quantize_module_transform_pass(
            tiny("llama-tiny", dtype=torch.float32), load_quant_config("c.toml")
        )
        return emitted, {step.record.name: step.record for step in kept}

    return compile_


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

    def test_in_bfloat16_with_solved_weights_too(self, compiled, tmp_path: Path) -> None:
        text = GPTQ + LINEARS + CACHE.replace("BITS", "4")
        Path("c.toml").write_text(text.replace("WIDTH", "4").replace("KEYS", ""))
        model = tiny("llama-tiny", dtype=torch.bfloat16)
        emitted, _ = quantize_module_transform_pass(model, load_quant_config("c.toml"))
        emitted.save_pretrained(tmp_path / "saved")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        assert again.dtype == torch.bfloat16 and torch.equal(logits(again), logits(emitted))
        assert torch.equal(again.generate(IDS, max_new_tokens=5), emitted.generate(IDS, max_new_tokens=5))

    @pytest.mark.parametrize("option", [{"safe_serialization": False}, {"variant": "fp16"}, {"state_dict": {}}])
    def test_an_option_that_would_be_ignored_is_refused_and_nothing_is_written(self, emitted, option, tmp_path) -> None:
        with pytest.raises(TypeError, match=f"takes max_shard_size, not {next(iter(option))}"):
            emitted.save_pretrained(tmp_path / "saved", **option)
        assert not (tmp_path / "saved").exists()

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


def test_row_6_the_search_scores_on_tokens_of_its_own(compiled, capsys) -> None:
    _, records = compiled(GPTQ + SEARCH + LINEARS)
    found = records["rotation-search"].details
    assert found["tokens"] == 3 * 24
    # Row 16: a line a round, with its perplexity, in what is no terminal.
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rotation search: ")]
    assert len(said) == len(found["steps"])
    assert said[0] == f"rotation search: nothing rotated, perplexity {found['baseline']:.4f} (2 steps)"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("gptq.pt", "nowhere.pt"), "nowhere.pt: no such file"),
        (("search.pt", "nowhere.pt"), "nowhere.pt: no such file"),
        (("calib_seqlen = 24", "calib_seqlen = 25"), "0 of 3 samples have 25 tokens or more"),
        (("file:gptq.pt", "wikitext3"), "wikitext3"),
    ],
)
def test_row_10_check_reads_the_collected_files(compiled, folder: Path, change: tuple[str, str], said: str) -> None:
    text = (GPTQ + SEARCH + LINEARS).replace("WIDTH", "4").replace("KEYS", f"model_name = '{folder}'")
    Path("c.toml").write_text(text.replace(*change))
    with pytest.raises(DatasetError, match=said):
        check(load_any("c.toml"))


def test_row_10_what_check_takes(compiled, folder: Path) -> None:
    Path("c.toml").write_text(
        (GPTQ + SEARCH + LINEARS).replace("WIDTH", "4").replace("KEYS", f"model_name = '{folder}'")
    )
    assert any(line.startswith("rotation-search: 4 sites (") for line in check(load_any("c.toml")).lines())


class TestRow8FilesOfMase:
    def test_its_layer_files_are_named_and_stay(self, compiled) -> None:
        Path("kept").mkdir()
        save_file({"model.layers.0.mlp.up_proj.weight": torch.ones(2, 2)}, "kept/quantized_model_layer_0.safetensors")
        before = Path("kept/quantized_model_layer_0.safetensors").read_bytes()
        with pytest.warns(UserWarning, match=r"kept holds quantized_model_layer_0.safetensors .* of another tool"):
            emitted, _ = compiled(GPTQ + LINEARS)
        assert Path("kept/quantized_model_layer_0.safetensors").read_bytes() == before
        Path("kept/quantized_model_layer_0.safetensors").unlink()
        assert torch.equal(logits(compiled(GPTQ + LINEARS)[0]), logits(emitted))

    @pytest.mark.parametrize("key", ["", "cache_path = 'kept/theirs.json'\n"])
    def test_its_decisions_are_left_alone_with_a_warning(self, compiled, key: str) -> None:
        theirs = {"winners": ["q_proj"], "final_ppl": 1.0, "baseline_ppl": 2.0}
        file = Path("kept/theirs.json" if key else "kept/rotation_decisions.json")
        file.parent.mkdir()
        file.write_text(json.dumps(theirs))
        with pytest.warns(UserWarning, match=rf"{file.name} is no file of mxfx: searching again"):
            _, records = compiled(GPTQ + SEARCH + key + LINEARS)
        assert json.loads(file.read_text()) == theirs
        assert records["rotation-search"].details["perplexity"] != 1.0


class TestRow9OneCheckpointFolder:
    @pytest.mark.parametrize(("keys", "resumed"), [("quantized_inputs = false", 2), ("quantized_inputs = true", 0)])
    def test_formats_of_activations_ask_for_no_second_gptq(self, compiled, keys: str, resumed: int) -> None:
        first, _ = compiled(GPTQ + LINEARS, 4, keys)
        second, records = compiled(GPTQ + LINEARS, 8, keys)
        assert records["gptq"].details["resumed_layers"] == resumed
        assert not torch.equal(logits(first), logits(second))

    @pytest.mark.parametrize(("keys", "resumed"), [("quantized_inputs = false", 2), ("quantized_inputs = true", 0)])
    def test_formats_of_the_cache_ask_for_no_second_gptq(self, compiled, keys: str, resumed: int) -> None:
        first, _ = compiled(GPTQ + LINEARS + CACHE.replace("BITS", "4"), 4, keys)
        second, records = compiled(GPTQ + LINEARS + CACHE.replace("BITS", "8"), 4, keys)
        assert records["gptq"].details["resumed_layers"] == resumed
        assert not torch.equal(logits(first), logits(second))

    def test_formats_of_weights_ask_for_another(self, compiled) -> None:
        compiled(GPTQ + LINEARS, 4, "quantized_inputs = false")
        wider = (GPTQ + LINEARS).replace("weight_width = 4", "weight_width = 5")
        assert compiled(wider, 4, "quantized_inputs = false")[1]["gptq"].details["resumed_layers"] == 0


class TestRow11Rotation:
    """Queries: `test_operands.py`. Probabilities: why they are rounded where they are, on plain tensors."""

    SEQ = 16

    def attended(self, rounded: Callable[[Tensor], Tensor], later: float) -> Tensor:
        """What the first token reads of values, the later ones of which are ``later``."""
        scores = torch.randn(self.SEQ, self.SEQ, generator=torch.Generator().manual_seed(0))
        hidden = torch.ones(self.SEQ, self.SEQ, dtype=torch.bool).triu(1)
        probs = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        values = torch.ones(self.SEQ, 1)
        values[9:] = later
        return (rounded(probs) @ values)[8]

    def test_rotated_probabilities_read_tokens_that_come_later(self) -> None:
        def rotated(probs: Tensor) -> Tensor:
            return rotated_mxint(probs, 4, 16)

        assert (self.attended(rotated, 1.0) - self.attended(rotated, 100.0)).abs() > 0.1
        assert torch.equal(self.attended(lambda p: p, 1.0), self.attended(lambda p: p, 100.0))

    @pytest.mark.parametrize(
        ("name", "form"),
        [("mxint", "data_in_width = 4"), ("mxfp", "data_in_exponent_width = 2\ndata_in_frac_width = 1")],
    )
    def test_so_they_are_rounded_as_they_are_and_it_is_said(self, compiled, name: str, form: str) -> None:
        attention = "by = 'regex_name'\n['model\\.layers\\.\\d+\\.self_attn$']\nname = 'NAME'\n"
        for stage in ("qk_matmul", "kv_cache", "softmax", "rope"):
            attention += f"['model\\.layers\\.\\d+\\.self_attn$'.{stage}]\nbypass = true\n"
        attention += "['model\\.layers\\.\\d+\\.self_attn$'.av_matmul]\ndata_in_block_size = 16\n" + form
        with pytest.warns(DialectWarning, match="the model reads ahead"):
            emitted, _ = compiled(attention.replace("NAME", f"{name}_rotate"))
        plain, _ = compiled(attention.replace("NAME", name))
        assert torch.equal(logits(emitted), logits(plain))
        changed = IDS.clone()
        changed[0, -1] += 1
        with torch.no_grad():
            assert torch.equal(emitted(changed).logits[:, :-1], logits(emitted)[:, :-1])
