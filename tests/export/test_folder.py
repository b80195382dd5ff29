"""What ``save_folder`` writes, transformers opens: Auto classes, pipelines, lm-eval, its server."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline

import mxfx
from mxfx.config import loads
from mxfx.driver.imported import import_checkpoint
from mxfx.driver.pretrained import ModelError, load_model, load_tokenizer
from mxfx.export.artefact import load
from mxfx.export.folder import MxfxForCausalLM, save_folder
from mxfx.export.target import export
from mxfx.export.unpack import unpacked
from mxfx.graph.trace import trace
from mxfx.pipeline.emit import emitted
from mxfx.pipeline.manager import PassManager, PipelineResult
from mxfx.rewrite.operands import is_rounded
from mxfx.runtime.causal_lm import as_causal_lm
from tests.local_model import save_model

_PIPELINE = """
[emit]
packed = true
[[pass]]
name = "annotate"
  [[pass.rule]]
  match  = '.*_proj'
  weight = "{0}"
  input  = "{0}"
[[pass]]
name = "round-weights"
[[pass]]
name = "insert-fake-quant"
"""
_IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("source") / "m")


@pytest.fixture(scope="module")
def result(source: Path) -> PipelineResult:
    pipeline = loads(_PIPELINE.format("mxfp4_e2m1@32")).completed().emitted("cpu")
    return PassManager().run(trace(load_model(source), name=str(source)), pipeline)


@pytest.fixture(scope="module")
def folder(source: Path, result: PipelineResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("emitted") / "model"
    save_folder(result.portable, made, tokenizer=load_tokenizer(source))
    return made


def test_the_auto_classes_open_the_emitted_model_bit_for_bit(folder: Path, result: PipelineResult) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model) is MxfxForCausalLM
    assert AutoConfig.from_pretrained(folder).vocab_size == 128
    assert torch.equal(model(_IDS).logits, as_causal_lm(result.program)(_IDS).logits)


def test_what_is_opened_and_saved_again_has_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "again")
    for file in (tmp_path / "again").iterdir():
        assert file.read_bytes() == (folder / file.name).read_bytes(), file.name


def test_files_of_weights_are_as_large_as_asked(folder: Path, result: PipelineResult, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "split", max_shard_size="20KB")
    files = sorted((tmp_path / "split").glob("weights-*.safetensors"))
    largest = max(tensor.nbytes for tensor in result.portable.weights.values())
    assert len(files) > 2
    # A header beside the tensors.
    assert all(file.stat().st_size <= max(20_000, largest) + 2_000 for file in files)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "split")
    assert torch.equal(again(_IDS).logits, model(_IDS).logits)
    model.save_pretrained(tmp_path / "nothing", is_main_process=False)
    assert not (tmp_path / "nothing").exists()
    with pytest.raises(TypeError, match="takes max_shard_size, not push_to_hub"):
        model.save_pretrained(tmp_path / "hub", push_to_hub=True)


def test_the_trainer_evaluates_it(folder: Path, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model = AutoModelForCausalLM.from_pretrained(folder)
    rows = [{"input_ids": ids.tolist(), "labels": ids.tolist()} for ids in _IDS]
    arguments = TrainingArguments(
        str(tmp_path), per_device_eval_batch_size=2, report_to=[], use_cpu=True, eval_do_concat_batches=True
    )
    found = Trainer(model, arguments, eval_dataset=rows).evaluate()
    assert found["eval_loss"] == pytest.approx(model(_IDS, labels=_IDS).loss.item(), abs=1e-5)


def test_a_card_with_the_figures_of_a_run_is_kept(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    with (copy / "README.md").open("a") as card:
        card.write("| domain | KL |")
    AutoModelForCausalLM.from_pretrained(copy).save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "README.md").read_bytes() == (copy / "README.md").read_bytes()


def test_weights_are_stored_packed_and_nothing_is_pickled(folder: Path) -> None:
    names = {file.name for file in folder.iterdir()}
    assert not any(name.endswith((".bin", ".pt", ".pkl", ".pt2")) for name in names)
    program = load(folder)
    assert "model.layers.0.mlp.up_proj.weight.codes" in program.weights
    assert "model.layers.0.mlp.up_proj.weight" not in program.weights


def test_another_dtype_is_refused(folder: Path) -> None:
    with pytest.raises(TypeError, match=r"lowered for torch\.bfloat16"):
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_options_that_an_emitted_model_cannot_honour_are_refused(folder: Path) -> None:
    for options, named in (
        ({"quantization_config": {"load_in_4bit": True}}, "cannot honour quantization_config"),
        ({"state_dict": {"x": 1}, "variant": "fp16"}, "cannot honour state_dict, variant"),
        ({"dtype": "fp8"}, "dtype is 'fp8', expected 'bfloat16' or 'auto'"),
    ):
        with pytest.raises(TypeError, match=named):
            MxfxForCausalLM.from_pretrained(folder, **options)
    opened = AutoModelForCausalLM.from_pretrained(folder, use_cache=False, dtype="bfloat16", attn_implementation="sdpa")
    assert not opened.generation_config.use_cache


def test_a_chat_template_of_another_tokenizer_does_not_stay(folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    program = load(folder)
    for template in ("{{ messages }}", None):
        tokenizer.chat_template = template
        save_folder(program, tmp_path / "out", tokenizer=tokenizer)
        assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == template


def test_transformers_pipeline_writes_text(folder: Path) -> None:
    written = pipeline("text-generation", str(folder))("w1 w2", max_new_tokens=4, do_sample=False)
    assert written[0]["generated_text"].startswith("w1 w2")


@pytest.mark.parametrize("more", ["import mxfx", ""])
def test_a_fresh_process_opens_it(folder: Path, result: PipelineResult, more: str) -> None:
    """With ``import mxfx`` no remote code runs; a program that never imports mxfx is told by the folder's own lines."""
    trusted = "" if more else ", trust_remote_code=True"
    code = f"""
{more}
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(folder)!r}{trusted})
print(model(torch.tensor({_IDS.tolist()})).logits.double().sum().item())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    expected = as_causal_lm(result.program)(_IDS).logits.double().sum().item()
    assert float(done.stdout.split()[-1]) == expected


def test_importing_mxfx_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, mxfx; print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_lm_eval_s_own_class_scores_it(folder: Path) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    mine = HFLM(pretrained=str(folder), device="cpu", batch_size=1, softmax_dtype="float32")
    request = Instance("loglikelihood", {}, ("w1 w2", " w3"), 0)
    ((score, _),) = mine.loglikelihood([request], disable_tqdm=True)
    ids = AutoTokenizer.from_pretrained(folder)("w1 w2 w3", return_tensors="pt").input_ids
    logits = as_causal_lm(emitted(load(folder)))(ids).logits[0, -2].float()
    assert score == pytest.approx(logits.log_softmax(-1)[ids[0, -1]].item(), abs=1e-5)


def test_a_checkpoint_of_another_tool_comes_in_with_its_bits(folder: Path, source: Path, tmp_path: Path) -> None:
    export(load(folder), tmp_path / "packed", "compressed-tensors", tokenizer=load_tokenizer(source))
    lines = list(import_checkpoint(tmp_path / "packed", tmp_path / "back"))
    assert lines[0] == "14 linears: weights mxfp4_e2m1@32, inputs mxfp4_e2m1@32"
    back, given = load(tmp_path / "back"), load(folder)
    name = "model.layers.1.mlp.down_proj.weight"

    assert torch.equal(unpacked(back).weights[name], unpacked(given).weights[name])


@pytest.mark.parametrize("own", ["bfloat16", "float16", "float32"])
def test_a_checkpoint_that_comes_in_keeps_its_own_dtype(own: str, source: Path, tmp_path: Path) -> None:
    pipeline = "[[pass]]\nname = 'annotate'\n[[pass.rule]]\nmatch = '.*_proj'\nweight = 'mxfp4_e2m1@32'\n"
    passes = loads(f"{pipeline}[[pass]]\nname = 'round-weights'").completed()
    rounded = PassManager().run(trace(load_model(source, own)), passes).program
    export(rounded, tmp_path / "packed", "compressed-tensors", tokenizer=load_tokenizer(source))
    lines = list(import_checkpoint(tmp_path / "packed", tmp_path / "back"))
    assert lines[1] == f"runs in {own}, the dtype of its config.json"
    back = load(tmp_path / "back")
    assert str(back.dtype) == f"torch.{own}"
    name = "model.layers.1.mlp.down_proj.weight"
    assert back.weights["model.norm.weight"].dtype == back.dtype
    assert torch.equal(unpacked(back).weights[name], rounded.weights[name])

    asked = list(import_checkpoint(tmp_path / "packed", tmp_path / "asked", "bfloat16"))
    assert asked[1] == "runs in bfloat16, as asked"
    assert load(tmp_path / "asked").dtype == torch.bfloat16
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    (tmp_path / "packed" / "config.json").write_text(json.dumps({**config, "dtype": "float8_e4m3fn"}))
    with pytest.raises(ModelError, match=r"no graph runs in dtype 'float8_e4m3fn'.*by --dtype"):
        list(import_checkpoint(tmp_path / "packed", tmp_path / "none"))


def test_the_command_says_what_it_found_and_no_library_more(folder: Path, source: Path, tmp_path: Path) -> None:
    export(load(folder), tmp_path / "packed", "compressed-tensors", tokenizer=load_tokenizer(source))
    command = [sys.executable, "-m", "mxfx", "import", tmp_path / "packed", "--out", tmp_path / "back"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[1] == "runs in bfloat16, the dtype of its config.json"
    assert "Warning" not in done.stderr


def test_codes_that_float16_does_not_hold_are_not_cut_to_it(source: Path, tmp_path: Path) -> None:
    model = load_model(source, "float32")
    with torch.no_grad():
        model.get_parameter("model.layers.0.self_attn.q_proj.weight").mul_(2.0**-30)
    passes = loads(
        "[[pass]]\nname = 'annotate'\n[[pass.rule]]\nmatch = '.*_proj'\nweight = 'mxfp4_e2m1@32'\n"
        "[[pass]]\nname = 'round-weights'"
    ).completed()
    export(PassManager().run(trace(model), passes).program, tmp_path / "packed", "compressed-tensors")
    with pytest.raises(ModelError, match=r"layers\.0\.self_attn\.q_proj\.weight has values outside float16's range"):
        list(import_checkpoint(tmp_path / "packed", tmp_path / "back", "float16"))
    assert not (tmp_path / "back").exists()


def test_an_nvfp4_checkpoint_comes_in_quantized_and_goes_out_again(source: Path, tmp_path: Path) -> None:
    rule = "[[pass.rule]]\nmatch = '.*_proj'\nweight = 'nvfp4'\n"
    pipeline = loads(f"[[pass]]\nname = 'annotate'\n{rule}[[pass]]\nname = 'round-weights'")
    rounded = PassManager().run(trace(load_model(source)), pipeline.completed()).program
    first = export(rounded, tmp_path / "packed", "compressed-tensors", tokenizer=load_tokenizer(source))
    lines = list(import_checkpoint(tmp_path / "packed", tmp_path / "back"))
    assert lines[0] == "14 linears: weights nvfp4, inputs float"
    back = load(tmp_path / "back")
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(back.weights[name].bfloat16(), rounded.weights[name].bfloat16())
    assert sum(is_rounded(node, "weight") for node in back.products()) == 14
    second = export(back, tmp_path / "again", "compressed-tensors")
    assert second.checks["of them quantized"] == first.checks["of them quantized"] == 14


def test_other_checkpoints_are_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is no compressed-tensors checkpoint"):
        list(import_checkpoint(source, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_would_be_measured_as_another_is_refused(folder: Path, source: Path, tmp_path: Path) -> None:
    """One that lacks a norm, whose gain would be ones; one whose cache is quantized; and nothing is written over."""
    packed, out = tmp_path / "packed", tmp_path / "out"
    export(load(folder), packed, "compressed-tensors", tokenizer=load_tokenizer(source))
    config, weights = packed / "config.json", packed / "model.safetensors"
    whole, tensors = json.loads(config.read_text()), load_file(weights)
    asks = {**whole["quantization_config"], "kv_cache_scheme": {"num_bits": 8, "type": "float"}}
    config.write_text(json.dumps({**whole, "quantization_config": asks}))
    with pytest.raises(ModelError, match="kv_cache_scheme asks for a quantized cache"):
        list(import_checkpoint(packed, out))
    config.write_text(json.dumps(whole))
    save_file({name: t for name, t in tensors.items() if name != "model.norm.weight"}, weights, {"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights.*model\.norm\.weight"):
        list(import_checkpoint(packed, out))
    assert not out.exists()
    with pytest.raises(ModelError, match="exists already and is not empty"):
        list(import_checkpoint(packed, folder))


def test_the_openai_client_streams_from_the_server_and_its_log_says_what_was_lost(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import socket

    from openai import BadRequestError, OpenAI, UnprocessableEntityError

    from mxfx.driver.serve import server

    counts = iter((0, 0, 0, 5))
    monkeypatch.setattr("mxfx.driver.proof.inexact_count", lambda: next(counts))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running = server(folder, host="127.0.0.1", port=port, device="cpu", background=True)
    try:
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=5)
        chunks = client.completions.create(model=str(folder), prompt="w1 w2", max_tokens=4, stream=True)
        assert "".join(choice.text for chunk in chunks for choice in chunk.choices).strip()
        with pytest.raises((BadRequestError, UnprocessableEntityError)):
            client.completions.create(model=str(folder), prompt="w1", extra_body={"no_such_option": 1})
        assert "octaves" not in caplog.text
        client.completions.create(model=str(folder), prompt="w3", max_tokens=1)
        assert caplog.text.count(f"{folder}: 5 rows of activations span more octaves than E4M3") == 1
    finally:
        running.kill_server()  # type: ignore[attr-defined]


def test_the_card_and_the_configuration_say_what_it_is(folder: Path) -> None:
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "import mxfx  # pip install mxfx" in card
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "mxfx"
    assert config["source"]["model_type"] == "llama"
    assert mxfx.load is not None
