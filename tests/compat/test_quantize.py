"""The tutorial's script for configuration A runs with nothing changed but its imports and the model's name."""

from __future__ import annotations

import tomllib
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import make_table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from mxfx import compat
from mxfx.calibration.datasets import documents
from mxfx.compat import quantize_module_transform_pass
from mxfx.config import ConfigError
from mxfx.evaluation.evaluate import evaluate
from mxfx.graph.weights import tensor_hash
from tests.local_model import save_model, save_texts
from tests.programs import relative
from tests.reference.lm_eval_task import local_task

CONFIG_A = Path(__file__).parents[2] / "passes_configs" / "tutorial_a_rtn.toml"
DEVICE = "cpu"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_texts(tmp_path_factory.mktemp("texts") / "documents")


# The next three functions are the tutorial's; `tasks=["wikitext"]` is a local task of that name.
def load_quant_config(path):
    with open(path, "rb") as f:
        raw = tomllib.load(f)
    by = raw.pop("by", "regex_name")
    pass_args = {"by": by}
    gptq = raw.pop("gptq", None)
    if gptq is not None:
        pass_args["gptq"] = deepcopy(gptq)
    for key, value in raw.items():
        pass_args[key] = {"config": deepcopy(value)}
    return pass_args


def evaluate_perplexity(model, tokenizer, task, max_length=64, batch_size=8):
    lm = HFLM(pretrained=model, tokenizer=tokenizer, max_length=max_length, batch_size=batch_size)
    results = simple_evaluate(model=lm, tasks=[task], batch_size=batch_size, limit=None)
    assert make_table(results)
    metrics = results["results"]["wikitext"]
    for k, v in metrics.items():
        if k.startswith("word_perplexity"):
            return float(v)
    raise KeyError(f"word_perplexity not found: {list(metrics)}")


def fresh_model(name, attn_implementation="eager"):
    model = AutoModelForCausalLM.from_pretrained(
        name,
        torch_dtype=torch.float16,
        attn_implementation=attn_implementation,
    )
    model.eval()
    return model


def test_the_tutorial_s_script_runs(folder: Path, texts: Path) -> None:
    # lm-eval's wikitext task on local documents: the hub may be out of reach.
    wikitext = local_task(documents(texts))
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    pass_args_a = load_quant_config(CONFIG_A)
    model_a = fresh_model(folder).to(DEVICE)
    model_a, _ = quantize_module_transform_pass(model_a, pass_args_a)
    model_a.to(DEVICE)
    ppl_a = evaluate_perplexity(model_a, tokenizer, wikitext)

    assert 1 < ppl_a < 1e6


def test_in_eight_bits_the_perplexity_is_nearly_the_model_s(folder: Path, texts: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    args = load_quant_config(CONFIG_A)
    for selector in list(args):
        if "proj" in selector:
            args[selector]["config"] |= {"weight_width": 8, "data_in_width": 8}
        elif selector != "by":
            args[selector]["config"]["kv_cache"]["data_in_width"] = 8
    emitted, _ = quantize_module_transform_pass(fresh_model(folder), args)
    perplexity, expected = (
        evaluate(model, tokenizer, eval_data=texts, max_length=64).word_perplexity
        for model in (emitted, fresh_model(folder, "sdpa"))
    )
    assert perplexity == pytest.approx(expected, rel=0.02)
    assert perplexity != expected


def test_both_loaders_lead_to_the_same_model(folder: Path) -> None:
    ids = torch.arange(3, 20)[None]
    ours, theirs = (
        quantize_module_transform_pass(fresh_model(folder), loader(CONFIG_A))[0](ids).logits
        for loader in (compat.load_quant_config, load_quant_config)
    )
    assert torch.equal(ours, theirs)


def test_the_result_is_a_causal_lm_and_an_empty_dictionary(folder: Path) -> None:
    model = fresh_model(folder)
    emitted, info = quantize_module_transform_pass(model, load_quant_config(CONFIG_A))
    assert isinstance(emitted, PreTrainedModel) and info == {}
    assert emitted.config.vocab_size == model.config.vocab_size
    assert emitted.device == model.device and emitted.dtype == torch.float16


def test_the_model_given_is_not_changed(folder: Path) -> None:
    model = fresh_model(folder)
    before = {name: tensor_hash(tensor) for name, tensor in model.state_dict().items()}
    emitted, _ = quantize_module_transform_pass(model, load_quant_config(CONFIG_A))
    assert {name: tensor_hash(tensor) for name, tensor in model.state_dict().items()} == before
    assert model.config._attn_implementation == "eager"
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert relative(emitted(ids).logits, model(ids).logits) > 0.01


def test_kv_bits_change_the_prefill(folder: Path) -> None:
    ids = torch.arange(3, 20)[None]
    logits = {}
    for width in (4, 8):
        args = load_quant_config(CONFIG_A)
        args[r"model\.layers\.\d+\.self_attn$"]["config"]["kv_cache"]["data_in_width"] = width
        logits[width] = quantize_module_transform_pass(fresh_model(folder), args)[0](ids).logits
    assert not torch.equal(logits[4], logits[8])


def test_an_argument_that_cannot_be_honoured_is_an_error_before_the_model_is_touched() -> None:
    args = load_quant_config(CONFIG_A) | {"qlora": {"config": {}}}
    with pytest.raises(ConfigError, match="qlora"):
        quantize_module_transform_pass(torch.nn.Linear(1, 1), args)
