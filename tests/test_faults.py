"""Faults that public reports of this field name: each has a test of the right value, or of the one clear error.

A: a wrong number or file and no word. B: a traceback, or an error that hides its cause. C: an emitted model that cannot
run. What has a room of its own is tested there; what stood in none is here.
"""

from __future__ import annotations

import ast
import copy
from pathlib import Path

import pytest
import torch
import transformers as T
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

import mxfx
from mxfx.calibration.datasets import DatasetError
from mxfx.config import loads
from mxfx.driver.generate import write
from mxfx.driver.job import Job
from mxfx.evaluation.evaluate import evaluate
from mxfx.evaluation.results import EvaluationError
from mxfx.evaluation.tasks import TaskOptions, run_task
from mxfx.graph.tiny import tiny
from mxfx.pipeline.manager import PassError
from mxfx.runtime.causal_lm import as_causal_lm
from tests.local_model import WORDS, save_texts
from tests.mixtures import mixture
from tests.programs import raised

TESTS = Path(__file__).parent
#: Kind of fault → where the tests of it are, as file::function.
FAULTS = {
    "A1 an op that changes its operand is erased": (
        "graph/test_functional.py::test_keys_assembled_in_place_are_those_of_the_model",
    ),
    "A2 a mask function is read as causal": (
        "graph/test_masks.py::test_any_mask_function_means_what_it_says_of_each_query_and_key",
        "graph/test_masks.py::test_padded_and_not_short_and_beyond_the_window_logits_are_those_of_the_model",
    ),
    "A3 a pipeline overwrites the float row": (
        "driver/test_runs.py::test_a_pipeline_cannot_take_the_name_of_something_else_in_the_directory",
    ),
    "A4 BOS is put twice": (
        "evaluation/test_evaluate.py::test_bos_is_put_once_where_the_tokenizer_puts_it_itself",
        "calibration/test_datasets.py::test_samples_begin_with_bos_where_the_tokenizer_puts_it",
        "test_faults.py::test_a_task_of_lm_eval_scores_bos_once",
    ),
    "A5 generation_config is lost": ("runtime/test_cache.py::test_how_a_model_generates_survives_trace_and_artefact",),
    "A6 inherited methods that cannot work": ("runtime/test_cache.py::test_what_a_graph_cannot_do_is_refused_by_name",),
    "A7 forward swallows what matters": (
        "runtime/test_cache.py::test_logits_to_keep_tuples_and_the_number_of_items_are_honoured",
    ),
    "A8 broken models pass": (
        "driver/test_runs.py::test_weights_that_the_checkpoint_lacks_and_an_idle_pass_are_warnings",
        "driver/test_runs.py::test_a_model_that_overflows_is_a_warning_and_its_results_are_json",
    ),
    "A9 a pass that did nothing passes --strict": (
        "driver/test_runs.py::test_weights_that_the_checkpoint_lacks_and_an_idle_pass_are_warnings",
        "pipeline/test_manager.py::test_a_pass_that_found_nothing_to_work_on_is_a_warning",
        "test_faults.py::test_a_transform_that_does_not_fit_the_model_is_warned_of",
    ),
    "A10 two runs into one directory": (
        "driver/test_runs.py::test_a_second_run_into_one_directory_is_refused",
        "driver/test_runs.py::test_two_pipelines_of_one_name_are_refused",
    ),
    "A11 a byte-order mark becomes text": ("calibration/test_datasets.py::test_a_byte_order_mark_is_no_text",),
    "A12 changes of an emitted module reach its model": (
        "graph/test_module.py::test_what_is_written_into_an_emitted_module_and_into_its_model_reaches_neither_the_other",
    ),
    "A13 matrices of a block transform that do not fit": (
        "ops/test_dialect.py::test_a_matrix_whose_shape_does_not_fit_is_an_error_of_the_op",
    ),
    "B1 exceptions outside the family": (
        "test_errors.py::test_every_exception_class_is_of_the_family",
        "test_errors.py::test_a_path_with_brackets_is_no_markup",
        "graph/test_functional.py::test_what_has_no_such_form_is_refused_with_the_reason",
        "graph/test_trace_experts.py::*",
        "driver/test_runs.py::test_what_is_known_at_once_is_said_before_a_model_is_read",
        "driver/test_runs.py::test_a_damaged_file_is_one_error",
        "driver/test_runs.py::test_a_directory_of_two_models_is_asked_for_one",
        "driver/test_runs.py::test_a_tokenizer_of_another_model_and_too_long_samples_are_refused",
        "calibration/test_hostile.py::test_a_column_of_another_type_is_named",
        "export/test_hostile.py::test_a_damaged_file_is_read_or_is_one_error",
        "test_faults.py::test_learned_positions_that_calibration_exceeds_are_one_error",
        "test_faults.py::test_text_beyond_learned_positions_is_not_written",
        "test_faults.py::test_a_tokenizer_without_bos_and_eos_is_scored",
        "test_faults.py::test_what_stops_a_task_of_lm_eval_is_one_error",
    ),
    "B2 the reproducer crashes": (
        "driver/test_runs.py::test_a_failure_is_reproduced_beside_the_float_model_and_short_samples",
    ),
    "B3 bisect and repro without the float reference": (
        "driver/test_runs.py::test_bisect_runs_a_pipeline_with_distill",
        "driver/test_runs.py::test_a_failure_is_reproduced_beside_the_float_model_and_short_samples",
    ),
    "B4 --trust-remote-code does not reach all": (
        "driver/test_runs.py::test_code_of_the_models_repository_is_run_where_it_is_allowed",
    ),
    "B5 a 4-D mask without positions": ("graph/test_module.py::test_a_mask_of_queries_and_keys_needs_no_positions",),
    "B6 rope types, another head, an offloaded model": (
        "graph/test_linears.py::*",
        "driver/test_runs.py::test_a_head_of_its_own_beside_a_tied_configuration_is_kept",
        "driver/test_runs.py::test_a_model_on_disk_is_refused",
    ),
    "B7 GPTQ's NaN names nothing": ("test_faults.py::test_gptq_names_the_weight_that_is_not_finite",),
    "B8 said late": (
        "driver/test_runs.py::test_what_is_known_at_once_is_said_before_a_model_is_read",
        "driver/test_runs.py::test_too_few_tokens_are_said_before_weights_are_read",
    ),
    "B9 a refusal takes seconds": (
        "test_startup.py::test_a_refusal_that_needs_no_pass_does_not_import_torch",
        "test_startup.py::test_config_show_takes_less_than_a_second_and_a_half_of_processor_time",
    ),
    "C strides of the source": ("passes/test_strides.py::test_an_emitted_model_runs",),
    "C what is saved is not run": ("driver/test_runs.py::test_an_artefact_that_computes_something_else_is_found",),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_has_its_tests(fault: str) -> None:
    for named in FAULTS[fault]:
        file, _, function = named.partition("::")
        tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
        found = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert function in found or (function == "*" and any(name.startswith("test_") for name in found)), named


def test_every_entry_is_there() -> None:
    expected = {*(f"A{i}" for i in range(1, 14)), *(f"B{i}" for i in range(1, 10)), "C"}
    assert {fault.partition(" ")[0] for fault in FAULTS} == expected


def tokenizer(**special: str) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", **special)


def test_a_transform_that_does_not_fit_the_model_is_warned_of() -> None:
    """Blocks of 32 on 75 channels, which share no divisor; rotations of a residual stream that a LayerNorm reads."""
    odd = tiny("llama-tiny", hidden_size=75, num_attention_heads=3, num_key_value_heads=3, head_dim=26)
    text = '[[pass]]\nname="transform-inputs"\nblock=32\nselect="layers: 0; role: q_proj, k_proj, v_proj"\n'
    with pytest.warns(UserWarning, match=r"transform-inputs: did nothing: 0 matched"):
        mxfx.compile(odd, loads(text))
    config = T.StableLmConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=128,
    )  # fmt: skip
    stable = T.AutoModelForCausalLM.from_config(config).eval()
    with pytest.warns(UserWarning, match=r"rotate-residual: did nothing: 0 matched, 1 skipped"):
        mxfx.compile(stable, loads('[[pass]]\nname="fuse-norm"\n[[pass]]\nname="rotate-residual"\n'))


def test_a_path_for_a_pipeline_and_missing_tokens_are_answered_with_what_gives_them() -> None:
    with pytest.raises(TypeError, match=r"the pipeline is 'a\.toml'; expected .* mxfx\.load_pipeline reads a file"):
        mxfx.compile(learned_positions(), "a.toml")
    with pytest.raises(PassError, match=r"needs calibration data and the run has none: .*; to mxfx\.compile, tokens"):
        mxfx.compile(learned_positions(), loads(GPTQ), instruments=())


def learned_positions() -> torch.nn.Module:
    config = T.GPT2Config(
        n_embd=64, n_layer=1, n_head=4, vocab_size=128, n_positions=32, bos_token_id=1, eos_token_id=2
    )
    return T.AutoModelForCausalLM.from_config(config).eval()


def test_learned_positions_that_calibration_exceeds_are_one_error() -> None:
    text = '[[pass]]\nname="transform-inputs"\nkind="wush"\n'
    with pytest.raises(PassError, match=r"samples of 40 tokens, the model takes at most 32 .*lower calibration.length"):
        mxfx.compile(learned_positions(), loads(text), tokens=torch.ones(2, 40, dtype=torch.int64), instruments=())
    with pytest.raises(DatasetError, match=r"the tokenizer gives id 128, the model embeds ids below 128"):
        given = torch.full((2, 8), 128)
        Job.of_model(learned_positions(), torch.device("cpu"), lambda: given).context(loads(text)).tokens()


def test_text_beyond_learned_positions_is_not_written() -> None:
    program = Job.of_model(learned_positions(), torch.device("cpu")).run(loads("pass = []").completed()).program
    prompt = " ".join(f"w{i}" for i in range(30))
    found = write(as_causal_lm(program), tokenizer(), prompt, max_new_tokens=10)
    assert found.tokens <= 2
    assert str(found).endswith("the model's context is full") == (found.tokens == 2)


def test_a_tokenizer_without_bos_and_eos_is_scored(tmp_path: Path) -> None:
    """The first token has nothing before it that it could be predicted from: what begins a text of its own is."""
    model = as_causal_lm(raised("llama-tiny"))
    found = evaluate(model, tokenizer(), eval_data=save_texts(tmp_path / "texts"))
    assert 1 < found.word_perplexity < 1e6


TASK = """task: {name}
output_type: loglikelihood_rolling
dataset_path: text
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: {metric}
"""


def task(folder: Path, text: str, metric: str = "word_perplexity") -> str:
    folder.mkdir(exist_ok=True)
    (folder / "words.txt").write_text(text + "\n")
    name = f"mxfx_{folder.name}"
    (folder / "task.yaml").write_text(TASK.format(name=name, file=folder / "words.txt", metric=metric))
    return name


def test_a_task_of_lm_eval_scores_bos_once(tmp_path: Path) -> None:
    """Its rolling windows put BOS in front themselves: a second one was scored, and made 362 of a perplexity of 161.

    The tokenizer begins every text with BOS of its own accord, as Llama 3's does.
    """
    model, special = as_causal_lm(raised("llama-tiny")), {"bos_token": "<s>", "eos_token": "</s>"}
    begins = tokenizer(**special)
    begins.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert begins("w1")["input_ids"][0] == 1
    name = task(tmp_path / "bos", " ".join(f"w{i}" for i in range(40)))
    options = TaskOptions(include_path=tmp_path / "bos")
    plain, own = (run_task(model, one, name, options).metrics for one in (tokenizer(**special), begins))
    assert own == plain


def test_what_stops_a_task_of_lm_eval_is_one_error(tmp_path: Path) -> None:
    name = task(tmp_path / "bare", "w1 w2 w3")
    with pytest.raises(EvaluationError, match=f"--eval {name}: lm-eval stopped: "):
        run_task(as_causal_lm(raised("llama-tiny")), object(), name, TaskOptions(include_path=tmp_path / "bare"))


GPTQ = '[[pass]]\nname="annotate"\n[[pass.rule]]\nrole="mlp"\nweight="mxint4@32"\n[[pass]]\nname="gptq"\n'


@pytest.mark.parametrize(
    ("make", "broken", "said"),
    [
        (
            lambda: tiny("llama-tiny"),
            "model.layers.1.mlp.up_proj.weight",
            r"layers\.1\.mlp\.up_proj\.weight \(read by ",
        ),
        (lambda: mixture("mixtral"), "model.layers.1.mlp.experts.down_proj", r"layers\.1\.mlp\.experts\.down_proj"),
    ],
    ids=["linears", "experts"],
)
def test_gptq_names_the_weight_that_is_not_finite(make, broken: str, said: str) -> None:
    model = copy.deepcopy(make())
    with torch.no_grad():
        model.get_parameter(broken).view(-1)[5] = torch.nan
    tokens = torch.randint(3, 128, (4, 16), generator=torch.Generator().manual_seed(0))
    with pytest.raises(PassError, match=said + r".*NaN"):
        mxfx.compile(model, loads(GPTQ), tokens=tokens, instruments=())
