"""The flows of PLENA's command lines, with mxfx's names imported in place of Mase's and nothing else changed.

``eval_lm`` (one config, lm-eval on what comes back; a config that only collects) and ``search_rotation``, with either
loader of configs; on a tiny local model and local texts.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from mxfx import compat
from mxfx.calibration.datasets import documents, load_tokens
from mxfx.compat import (
    ALL_MATMUL_TYPES,
    CollectorFull,
    attach_token_collector_pass,
    get_loaders,
    quantize_module_transform_pass,
    rotation_search_transform_pass,
)
from tests.local_model import save_model, save_texts
from tests.reference.lm_eval_task import local_task

_SELECTORS = r"""
['model\.layers\.\d+\.self_attn$']
name = "mxint"
['model\.layers\.\d+\.self_attn$'.qk_matmul]
bypass = true
['model\.layers\.\d+\.self_attn$'.av_matmul]
bypass = true
['model\.layers\.\d+\.self_attn$'.kv_cache]
data_in_block_size = 16
data_in_width = 4
['model\.layers\.\d+\.self_attn$'.softmax]
bypass = true
['model\.layers\.\d+\.self_attn$'.rope]
bypass = true
['model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj']
name = "mxint"
weight_block_size = 32
weight_width = 4
data_in_block_size = 32
data_in_width = 4
gptq = true
"""
_GPTQ = """
by = "regex_name"
[gptq]
format = "mxint"
dataset = "file:DATA"
nsamples = 4
seqlen = 16
cali_batch_size = 4
checkpoint_dir = "CACHE"
[gptq.weight_config]
weight_block_size = 32
weight_width = 4
"""
_SEARCH = """
[rotation_search]
calib_nsamples = 4
calib_seqlen = 16
"""
_COLLECT = """
[token_collector]
target_nsamples = 4
seqlen = 16
save_path = "SAVED"
min_prefill_tokens = 4
raise_on_full = true
"""


def load_wrapped(path: Path) -> dict:
    """The tutorial's: every block but ``gptq`` under ``config``."""
    raw = tomllib.loads(path.read_text())
    args: dict = {"by": raw.pop("by", "regex_name")}
    args |= {"gptq": deepcopy(raw.pop("gptq"))} if "gptq" in raw else {}
    return args | {key: {"config": deepcopy(value)} for key, value in raw.items()}


def load_flat(path: Path) -> dict:
    """PLENA's: ``gptq``, ``rotation_search``, ``token_collector`` as they are, selectors under ``config``."""
    raw = tomllib.loads(path.read_text())
    args: dict = {"by": raw.pop("by", "regex_name")}
    args |= {key: deepcopy(raw.pop(key)) for key in ("gptq", "token_collector", "rotation_search") if key in raw}
    return args | {key: {"config": deepcopy(value)} for key, value in raw.items()}


Loader = Callable[[Path], dict]


def eval_lm(folder: Path, config: Path, task: object, load_quant_config: Loader) -> tuple[dict, object]:
    """What ``eval_lm`` does between its arguments and its prints."""
    device = "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    info = None
    pass_args = load_quant_config(config)
    if "token_collector" in pass_args:
        model.to(device)
        model, info = attach_token_collector_pass(model, pass_args.pop("token_collector"))
    if "gptq" in pass_args or any(key != "by" for key in pass_args):
        if "gptq" in pass_args:
            pass_args["gptq"]["device"] = device
        if "rotation_search" in pass_args:
            pass_args["rotation_search"]["device"] = device
            pass_args["rotation_search"].setdefault("model_name", str(folder))
        model, _ = quantize_module_transform_pass(model, pass_args)
    model.to(device)
    try:
        lm = HFLM(pretrained=model, tokenizer=tokenizer, max_length=32, batch_size=2)
        # The task is at hand: nobody reads the files of all that lm-eval brings, nor draws its errors from the scores.
        tasks = TaskManager(include_defaults=False)
        results = simple_evaluate(
            model=lm, tasks=[task], batch_size=2, log_samples=False, task_manager=tasks, bootstrap_iters=0
        )
    except CollectorFull:
        results = {"calibration_only": True}
    if info is not None and not info["collector"].complete:
        info["collector"].finalize()
    return results, model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_texts(tmp_path_factory.mktemp("texts") / "documents", documents=4)


@pytest.fixture
def task(texts: Path) -> object:
    return local_task(documents(texts))


@pytest.fixture
def config(tmp_path: Path, texts: Path) -> Callable[[str], Path]:
    def written(text: str) -> Path:
        file = tmp_path / "c.toml"
        for name, path in (("DATA", texts), ("CACHE", tmp_path / "gptq"), ("SAVED", tmp_path / "calib" / "c.pt")):
            text = text.replace(name, str(path))
        file.write_text(text)
        return file

    return written


@pytest.mark.filterwarnings("ignore::mxfx.compat.table.DialectWarning")
@pytest.mark.parametrize("load", [load_flat, compat.load_quant_config], ids=["plena's loader", "mxfx's loader"])
def test_eval_lm_searches_and_scores(
    load: Loader, folder: Path, task: object, config: Callable, tmp_path: Path
) -> None:
    file = config(_GPTQ.replace("[gptq]", f'[gptq]\nmodel_name = "{folder}"') + _SEARCH + _SELECTORS)
    results, _ = eval_lm(folder, file, task, load)
    assert results["results"]["wikitext"]["word_perplexity,none"] > 1
    decided = json.loads((tmp_path / "gptq" / "rotation_decisions.json").read_text())
    assert decided["perplexity"] <= decided["baseline"]


def test_the_tutorial_s_loader_scores_the_same(folder: Path, task: object, config: Callable) -> None:
    file = config("by = 'regex_name'\n" + _SELECTORS.replace("gptq = true\n", ""))
    scores = [eval_lm(folder, file, task, load)[0]["results"]["wikitext"] for load in (load_wrapped, load_flat)]
    assert scores[0]["word_perplexity,none"] == scores[1]["word_perplexity,none"] > 1


@pytest.mark.parametrize("load", [load_flat, compat.load_quant_config], ids=["plena's loader", "mxfx's loader"])
def test_eval_lm_collects_what_lm_eval_feeds(
    load: Loader, folder: Path, task: object, config: Callable, tmp_path: Path
) -> None:
    results, _ = eval_lm(folder, config(_COLLECT), task, load)
    assert results == {"calibration_only": True}
    saved = torch.load(tmp_path / "calib" / "c.pt", weights_only=True)
    assert (saved["collected_samples"], saved["seqlen"], saved["format_version"]) == (4, 16, 1)
    ids, target = saved["loader"][0]
    assert (
        ids.shape == target.shape == (1, 16) and target[0, -1] == ids[0, -1] and set(target[0, :-1].tolist()) == {-100}
    )
    read = load_tokens(tmp_path / "calib" / "c.pt", None, samples=4, length=16, seed=0)
    assert torch.equal(read.ids, torch.cat([ids for ids, _ in saved["loader"]]))


def test_a_collector_goes_over_to_the_emitted_model(
    folder: Path, task: object, config: Callable, tmp_path: Path
) -> None:
    """It hears what is evaluated, and nothing of the trace."""
    selectors = _SELECTORS.replace("gptq = true\n", "")
    eval_lm(folder, config(_COLLECT + selectors), task, load_flat)
    heard = torch.load(tmp_path / "calib" / "c.pt", weights_only=True)["loader"]
    (tmp_path / "calib" / "c.pt").unlink()
    eval_lm(folder, config(_COLLECT), task, load_flat)
    expected = torch.load(tmp_path / "calib" / "c.pt", weights_only=True)["loader"]
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(heard, expected, strict=True))


@pytest.mark.filterwarnings("ignore::mxfx.compat.table.DialectWarning")
def test_search_rotation_has_tokens_of_its_own(folder: Path, texts: Path, config: Callable, tmp_path: Path) -> None:
    base = load_flat(config(_GPTQ + _SELECTORS))
    base["gptq"] |= {"device": "cpu", "model_name": str(folder)}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    loader = get_loaders(str(texts), nsamples=3, seed=0, seqlen=20, model=str(folder))
    search = {
        "base_quantize_args": base,
        "calib_loader": loader,
        "device": "cpu",
        "matmul_types": ALL_MATMUL_TYPES,
        "output_json": str(tmp_path / "found.json"),
        "improvement_eps": 0.0,
    }
    emitted, results = rotation_search_transform_pass(model, search)
    assert json.loads((tmp_path / "found.json").read_text()) == results
    assert results["final_ppl"] <= results["baseline_ppl"]
    assert results["per_type_swap_count"]["q_proj"] == 2
    assert (
        results["rounds"][0]["committed_before"] == []
        and results["rounds"][0]["current_ppl_before"] == (results["baseline_ppl"])
    )
    assert results["n_trials"] == sum(len(one["round_ppls"]) for one in results["rounds"])
    with torch.no_grad():
        losses = [emitted(ids, labels=ids).loss for ids, _ in loader]
    assert torch.stack(losses).mean().exp().item() == pytest.approx(results["final_ppl"], rel=1e-4)


@pytest.mark.filterwarnings("ignore::mxfx.compat.table.DialectWarning")
def test_winners_are_read_again_and_mase_s_own_file_is_left_alone(
    folder: Path, texts: Path, config: Callable, tmp_path: Path
) -> None:
    base = load_flat(config("by = 'regex_name'\n" + _SELECTORS.replace("gptq = true\n", "")))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    file = tmp_path / "found.json"
    search = {"base_quantize_args": base, "calib_loader": get_loaders(str(texts), 2, 0, 16, str(folder)),
              "device": "cpu", "output_json": str(file), "cache_winners": True}  # fmt: skip
    _, first = rotation_search_transform_pass(model, search)
    _, second = rotation_search_transform_pass(model, search)
    assert "from_cache" not in first and second == first | {"from_cache": True}
    file.write_text(json.dumps({"winners": ["q_proj"], "final_ppl": 1.0}))
    with pytest.warns(UserWarning, match=r"found\.json is (no file of mxfx|another tool's)"):
        _, third = rotation_search_transform_pass(model, search)
    assert third == first and json.loads(file.read_text()) == {"winners": ["q_proj"], "final_ppl": 1.0}
