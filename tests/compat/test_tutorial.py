"""The tutorial's TOML is accepted unchanged; every key of its dialect is honoured or refused by name."""

from __future__ import annotations

import hashlib
import tomllib
from copy import deepcopy
from pathlib import Path

import pytest
import torch

from mxfx.compat import from_pass_args, load_any, load_quant_config
from mxfx.compat.table import DialectWarning
from mxfx.compat.tutorial import from_tutorial
from mxfx.config import ConfigError, Pipeline, loads, to_toml
from mxfx.config.locate import parse_toml
from mxfx.pipeline.manager import PassManager
from mxfx.rewrite import Context
from tests.programs import traced

CONFIGS = Path(__file__).parents[2] / "passes_configs"
#: SHA-256 of the TOML literals of tutorial 7, without the indentation of the page.
TUTORIAL = {
    "tutorial_a_rtn.toml": "af66913cba13e688af991bf0cc075f2bcf18f9380eb70dcf63520e361c3b7e52",
    "tutorial_b_gptq.toml": "3ed3bbd1700140687a855d2fc37b3bb129ad3b21fff040051e4fb7c0b1776af6",
    "tutorial_c_rotation_search.toml": "7fc1e821124bf3672e63ed2e8bd4879a2174e8b0bf281c1c6fb636b6b1201471",
}

MATCH_ATTENTION = r"model\.layers\.\d+\.self_attn$"
MATCH_QKVO = r"model\.layers\.\d+\.self_attn\.(q|k|v|o)_proj"
MATCH_MLP = r"model\.layers\.\d+\.mlp\.(gate|up|down)_proj"
RULES = [
    {"match": MATCH_ATTENTION, "kv": "mxint4@32/ceil"},
    {"match": MATCH_QKVO, "weight": "mxint4@32/ceil", "input": "mxint4@32/ceil"},
    {"match": MATCH_MLP, "weight": "mxint4@32/ceil", "input": "mxint4@32/ceil"},
]
RAISE = ["raise-norm", "raise-rope", "raise-attention", "split-fused"]

COLLECTOR = "by = 'regex_name'\n[token_collector]\ntarget_nsamples = 4\nseqlen = 16\nsave_path = 'c.pt'\n"
LINEAR = "name = 'mxint'\nweight_width = 4\nweight_block_size = 32\n"
FLOAT_WEIGHT = "weight_exponent_width = 3\nweight_frac_width = 4\n"
FLOAT_INPUT = "data_in_exponent_width = 3\ndata_in_frac_width = 4\n"
INPUT = "data_in_width = 4\ndata_in_block_size = 32\n"
STAGES = ("qk_matmul", "av_matmul", "kv_cache", "softmax", "rope")


def pipeline_of(text: str) -> Pipeline:
    document = parse_toml(text, "t.toml")
    return from_tutorial(document.value, document.root)


def options_of(pipeline: Pipeline, name: str) -> dict:
    found = [spec.options for spec in pipeline.specs if spec.name == name]
    assert len(found) == 1, f"{len(found)} passes {name}"
    return dict(found[0])


def names_of(pipeline: Pipeline) -> list[str]:
    return [spec.name for spec in pipeline.specs]


def selector(body: str, pattern: str = "m") -> str:
    return f"by = 'regex_name'\n['{pattern}']\n{body}"


def attention(name: str = "mxint", **stages: str) -> str:
    """An attention selector whose stages are bypassed unless given."""
    tables = [f"['a'.{stage}]\n{stages.get(stage, 'bypass = true')}\n" for stage in STAGES]
    return f"by = 'regex_name'\n['a']\nname = '{name}'\n" + "".join(tables)


def with_gptq(gptq: str = "", linear: str = "gptq = true\n") -> str:
    table = gptq + "[gptq.weight_config]\nweight_width = 4\nweight_block_size = 32\n"
    return f"by = 'regex_name'\n[gptq]\nformat = 'mxint'\n{table}['m']\n{LINEAR}{linear}"


def with_search(search: str) -> str:
    return with_gptq() + "[rotation_search]\n" + search


@pytest.mark.parametrize("name", TUTORIAL)
def test_the_files_are_the_tutorial_byte_for_byte(name: str) -> None:
    assert hashlib.sha256((CONFIGS / name).read_bytes()).hexdigest() == TUTORIAL[name]


def test_config_a() -> None:
    pipeline = load_any(CONFIGS / "tutorial_a_rtn.toml")
    assert names_of(pipeline) == [
        *RAISE,
        "annotate",
        "round-weights",
        "insert-fake-quant",
        "quantize-kv-cache",
    ]
    assert options_of(pipeline, "annotate") == {"rule": RULES, "unmatched": "warn"}


def test_config_b_adds_gptq() -> None:
    pipeline = load_any(CONFIGS / "tutorial_b_gptq.toml")
    rest = ["round-weights", "insert-fake-quant", "quantize-kv-cache"]
    assert names_of(pipeline) == [*RAISE, "annotate", "gptq", *rest]
    assert options_of(pipeline, "annotate") == {"rule": RULES, "unmatched": "warn"}
    assert options_of(pipeline, "gptq") == {
        "select": f"(?:{MATCH_QKVO})|(?:{MATCH_MLP})",
        "exponents": "sweep",
        "batch_size": 8,
        "quantized_inputs": True,
        "checkpoint_dir": "tutorial_7_output/checkpoints/config_b_gptq",
    }
    assert pipeline.model.name == "unsloth/Llama-3.2-1B"
    calibration = pipeline.calibration
    assert (calibration.dataset, calibration.samples, calibration.length) == ("wikitext2", 32, 512)


def test_config_c_adds_the_rotation_search() -> None:
    pipeline = load_any(CONFIGS / "tutorial_c_rotation_search.toml")
    rest = ["round-weights", "rotation-search", "insert-fake-quant", "quantize-kv-cache"]
    assert names_of(pipeline) == [*RAISE, "annotate", "gptq", *rest]
    assert options_of(pipeline, "rotation-search") == {
        "samples": 32,
        "length": 512,
        "improvement_eps": 0.0,
        "cache_path": "tutorial_7_output/checkpoints/config_c_rotsearch/rotation_decisions.json",
    }


@pytest.mark.parametrize("name", TUTORIAL)
def test_c_reuses_b_and_every_emitted_option_points_into_the_file(name: str) -> None:
    pipeline = load_any(CONFIGS / name)
    lines = (CONFIGS / name).read_text().splitlines()
    index = names_of(pipeline).index("annotate")
    place = pipeline.location(index, ("rule", 1, "weight"))
    assert lines[place.line - 1] == place.text == "weight_width = 4"
    assert lines[pipeline.location(index, ("rule", 2, "match")).line - 1] == f"['{MATCH_MLP}']"


def test_what_config_a_becomes_loads_as_a_pipeline_file() -> None:
    pipeline = load_any(CONFIGS / "tutorial_a_rtn.toml")
    assert loads(to_toml(pipeline)) == pipeline


def tutorial_loader(path: Path) -> dict:
    """What the tutorial's own loader returns (page "Setup")."""
    raw = tomllib.loads(path.read_text())
    by, gptq = raw.pop("by", "regex_name"), raw.pop("gptq", None)
    args = {"by": by, **({"gptq": gptq} if gptq is not None else {})}
    return args | {key: {"config": value} for key, value in raw.items()}


@pytest.mark.parametrize("name", TUTORIAL)
def test_the_loader_gives_what_plena_s_loader_gives(name: str) -> None:
    """The tutorial's, but for a ``rotation_search`` that callers write ``device`` and ``model_name`` into."""
    args = load_quant_config(CONFIGS / name)
    expected = tutorial_loader(CONFIGS / name)
    if "rotation_search" in expected:
        expected["rotation_search"] = expected["rotation_search"]["config"]
    assert args == expected
    assert ("rotation_search" in args) == ("c_rot" in name)


@pytest.mark.parametrize("name", TUTORIAL)
def test_pass_args_of_either_loader_make_the_same_pipeline_and_stay_as_they_are(name: str) -> None:
    args = tutorial_loader(CONFIGS / name)
    before = deepcopy(args)
    assert from_pass_args(args) == from_pass_args(load_quant_config(CONFIGS / name)) == load_any(CONFIGS / name)
    assert args == before


def test_a_mistake_in_pass_args_names_the_keys_that_lead_to_it() -> None:
    with pytest.raises(ConfigError, match=r"^pass_args: at m\.weight_with: unknown key 'weight_with'"):
        from_pass_args({"by": "regex_name", "m": {"config": {**tomllib.loads(LINEAR), "weight_with": 4}}})


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (selector(LINEAR), {"match": "m", "weight": "mxint4@32/ceil"}),
        (selector(LINEAR + "clip_search = true"), {"match": "m", "weight": "mxint4@32/mse"}),
        (selector(LINEAR + "bias_width = 8\nbias_block_size = 16"),
         {"match": "m", "weight": "mxint4@32/ceil", "bias": "mxint8@16/ceil"}),
        (selector("name = 'mxfp'\ndata_in_block_size = 32\n" + FLOAT_INPUT.replace("4", "2")),
         {"match": "m", "input": "mxfp6_e3m2@32"}),
        (selector("name = 'minifloat'\n" + FLOAT_WEIGHT + FLOAT_INPUT
                  + "data_in_is_finite = true\nweight_round_mode = 'rn'"),
         {"match": "m", "weight": "minifloat_e3m4", "input": "minifloat_e3m4"}),
        (selector("name = 'mxfp'\nweight_exponent_width = 1\nweight_frac_width = 2\nweight_block_size = 32"),
         {"match": "m", "weight": "mxfp4_e1m2@32"}),
        (selector("name = 'minifloat'\n" + FLOAT_WEIGHT + "weight_is_finite = false\nweight_round_mode = 'rz'"),
         {"match": "m", "weight": "minifloat_e3m4_ieee/rz"}),
        (selector("name = 'minifloat'\nvector_format = 'FP_E6M5'"),
         {"match": "m", "input": "minifloat_e6m5"}),
        (selector("name = 'minifloat'\n" + FLOAT_INPUT, r"model\.layers\.\d+\.mlp$"),
         {"match": r"(?:model\.layers\.\d+\.mlp)\.act_fn", "input": "minifloat_e3m4"}),
        (selector("name = 'minifloat'\nweight_bypass = true\n" + FLOAT_WEIGHT + FLOAT_INPUT),
         {"match": "m", "input": "minifloat_e3m4"}),
        (selector("name = 'mxint'\n" + FLOAT_INPUT, r"l\.\d+\.mlp$"),
         {"match": r"(?:l\.\d+\.mlp)\.act_fn", "input": "minifloat_e3m4"}),
        (f"by = 'name'\n['model.layers.0.mlp.up_proj']\n{LINEAR}",
         {"match": r"model\.layers\.0\.mlp\.up_proj", "weight": "mxint4@32/ceil"}),
        (attention(qk_matmul="data_in_width = 4\ndata_in_block_size = 16",
                   av_matmul="data_in_width = 8\ndata_in_block_size = 16"),
         {"match": "a", "q": "mxint4@16/ceil", "probs": "mxint8@16/ceil"}),
        (attention("mxfp", kv_cache="data_in_block_size = 32\n" + FLOAT_INPUT.replace("4", "2")),
         {"match": "a", "kv": "mxfp6_e3m2@32"}),
        (attention(softmax=FLOAT_INPUT,
                   rope="data_in_exponent_width = 4\ndata_in_frac_width = 3"),
         {"match": "a", "softmax": "minifloat_e3m4", "rope": "minifloat_e4m3"}),
        (attention(kv_cache="key = {data_in_width = 4, data_in_block_size = 32}\n"
                            "value = {data_in_width = 8, data_in_block_size = 16}"),
         {"match": "a", "k": "mxint4@32/ceil", "v": "mxint8@16/ceil"}),
    ],
)  # fmt: skip
def test_a_selector_becomes_a_rule(text: str, rule: dict) -> None:
    assert options_of(pipeline_of(text), "annotate") == {"rule": [rule], "unmatched": "warn"}


def test_only_the_passes_that_have_work_are_emitted() -> None:
    assert names_of(pipeline_of("by = 'regex_name'\n['m']\nname = 'mxint'\nbypass = true")) == RAISE
    assert names_of(pipeline_of(selector(LINEAR))) == [*RAISE, "annotate", "round-weights"]
    probs = attention(av_matmul=INPUT)
    assert names_of(pipeline_of(probs)) == [*RAISE, "annotate", "expand-attention", "insert-fake-quant"]


def test_a_bypassed_selector_keeps_its_modules_from_later_ones() -> None:
    text = "by = 'regex_name'\n['a.*']\nbypass = true\n" + f"['b|.*']\n{LINEAR}"
    assert options_of(pipeline_of(text), "annotate")["rule"][0]["match"] == r"(?!(?:a.*)\Z)(?:b|.*)"


def test_a_module_belongs_to_the_first_selector_alone() -> None:
    text = f"by = 'regex_name'\n['a']\n{LINEAR}\n['.*']\n{LINEAR}{INPUT}"
    rules = options_of(pipeline_of(text), "annotate")["rule"]
    assert [rule["match"] for rule in rules] == ["a", r"(?!(?:a)\Z).*"]


def test_gptq_without_flags_takes_every_weight() -> None:
    assert options_of(pipeline_of(with_gptq(linear="")), "gptq")["select"] == "m"


def test_gptq_gives_its_format_to_a_flagged_selector_without_one() -> None:
    text = with_gptq().replace("weight_width = 4\nweight_block_size = 32\ngptq", "gptq")
    assert options_of(pipeline_of(text), "annotate")["rule"] == [{"match": "m", "weight": "mxint4@32/mse"}]


def test_gptq_keys_without_a_value_get_mase_s_defaults() -> None:
    pipeline = pipeline_of(with_gptq())
    found = pipeline.calibration
    assert (found.dataset, found.samples, found.length) == ("wikitext2", 128, 256)
    given = {"select": "m", "exponents": "rule", "batch_size": 32, "quantized_inputs": True}
    assert options_of(pipeline, "gptq") == given


def test_the_two_searches_of_gptq_are_two_pipelines() -> None:
    """``quantile_search``: the scale with the smaller error of the weight; ``clip_search_y``: that of the output."""
    by_weight = pipeline_of(with_gptq("quantile_search = true\nclip_search_y = false\n"))
    by_output = pipeline_of(with_gptq("quantile_search = true\nclip_search_y = true\n"))
    neither = pipeline_of(with_gptq("quantile_search = false\nclip_search_y = false\n"))
    found = [
        (options_of(p, "gptq")["exponents"], options_of(p, "annotate")["rule"][0]["weight"])
        for p in (by_weight, by_output, neither)
    ]
    assert found == [("rule", "mxint4@32/mse"), ("sweep", "mxint4@32/ceil"), ("rule", "mxint4@32/ceil")]


def test_sixteen_bits_and_more_leave_the_operand_as_it_is() -> None:
    text = selector(LINEAR.replace("4", "16") + INPUT)
    assert options_of(pipeline_of(text), "annotate")["rule"] == [{"match": "m", "input": "mxint4@32/ceil"}]
    assert names_of(pipeline_of(selector(LINEAR.replace("4", "32")))) == RAISE
    of_all = attention(qk_matmul=INPUT).replace("'mxint'\n", "'mxint'\n" + (LINEAR + INPUT).replace("4", "16")[15:])
    assert options_of(pipeline_of(of_all), "annotate")["rule"] == [{"match": "a", "q": "mxint4@32/ceil"}]
    cache = attention(kv_cache="data_in_width = 16\ndata_in_block_size = 32", qk_matmul=INPUT)
    assert options_of(pipeline_of(cache), "annotate")["rule"] == [{"match": "a", "q": "mxint4@32/ceil"}]
    float_weights = with_gptq().replace("weight_width = 4", "weight_width = 16")
    assert names_of(pipeline_of(float_weights)) == RAISE


def test_what_callers_of_mase_set_is_taken() -> None:
    assert names_of(pipeline_of(with_gptq("device = 'cuda:0'\nmodel_name = 'a/b'\n"))) == names_of(
        pipeline_of(with_gptq())
    )
    with pytest.warns(
        DialectWarning, match=r"t\.toml:4:1: hf_token is not read: set the environment variable HF_TOKEN"
    ):
        pipeline_of(with_gptq("hf_token = 'secret'\n"))


def test_a_collector_beside_selectors_is_named_and_leaves_the_pipeline_alone(tmp_path: Path) -> None:
    with pytest.warns(DialectWarning, match=r"t\.toml:6:1: .token_collector. records .*no pass does; `mxfx collect"):
        found = pipeline_of(selector(LINEAR) + COLLECTOR.partition("\n")[2])
    assert names_of(found) == names_of(pipeline_of(selector(LINEAR)))
    (tmp_path / "c.toml").write_text(COLLECTOR)
    assert load_quant_config(tmp_path / "c.toml") == {
        "by": "regex_name",
        "token_collector": {"target_nsamples": 4, "seqlen": 16, "save_path": "c.pt"},
    }


def test_norms_of_queries_and_keys_become_a_rule_of_their_own() -> None:
    text = attention(kv_cache=INPUT) + f"['a'.qk_norm]\n{FLOAT_INPUT}{FLOAT_WEIGHT}"
    assert options_of(pipeline_of(text), "annotate")["rule"] == [
        {"match": "a", "kv": "mxint4@32/ceil"},
        {"match": r"(?:a)\.[qk]_norm", "weight": "minifloat_e3m4", "input": "minifloat_e3m4"},
    ]


def test_queries_rotate_and_probabilities_are_only_quantized() -> None:
    text = attention("mxint_rotate", qk_matmul=INPUT, kv_cache=INPUT)
    assert options_of(pipeline_of(text), "online-rotation") == {"select": "a", "sites": ["qk_matmul", "kv_cache"]}
    with pytest.warns(DialectWarning, match="av_matmul is quantized without a rotation: .* the model reads ahead"):
        found = pipeline_of(attention("mxint_rotate", av_matmul=INPUT))
    assert "online-rotation" not in names_of(found)


def test_the_search_keeps_its_decisions_beside_gptq_s_checkpoints() -> None:
    text = with_gptq("checkpoint_dir = 'out/gptq'\n") + "[rotation_search]\n"
    assert options_of(pipeline_of(text), "rotation-search")["cache_path"] == "out/gptq/rotation_decisions.json"
    off = options_of(pipeline_of(text + "cache_winners = false\n"), "rotation-search")
    assert "cache_path" not in off


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("calib_nsamples = 8\ncalib_seqlen = 256\n", {"samples": 8, "length": 256}),
        ("calib_seqlen = 2048\n", {"samples": 32, "length": 2048, "dataset": "wikitext2"}),
        ("calib_data = 'file:c.pt'\n", {"samples": 32, "length": 1024, "dataset": "c.pt"}),
    ],
)
def test_a_search_has_tokens_of_its_own_unless_they_are_gptq_s(asked: str, found: dict) -> None:
    """GPTQ's are 128 samples of 256 tokens of wikitext2."""
    assert options_of(pipeline_of(with_search(asked)), "rotation-search") == found


def test_no_search_at_all_means_the_rule_of_the_format() -> None:
    pipeline = pipeline_of(with_gptq("quantile_search = false\nmax_layers = 3\ndataset = 'file:x.txt'\n"))
    assert options_of(pipeline, "gptq")["exponents"] == "rule"
    assert options_of(pipeline, "gptq")["max_layers"] == 3
    assert pipeline.calibration.dataset == "x.txt"


def test_rotating_quantizers_become_online_rotations() -> None:
    text = selector(LINEAR.replace("mxint", "mxint_rotate") + INPUT + "force_fp32_had = true\n")
    assert options_of(pipeline_of(text), "online-rotation") == {"select": "m"}
    cache = attention("mxint_rotate", kv_cache=INPUT)
    assert options_of(pipeline_of(cache), "online-rotation") == {"select": "a", "sites": ["kv_cache"]}
    off = attention("mxint_rotate", kv_cache=INPUT + "rotate = false")
    assert "online-rotation" not in names_of(pipeline_of(off))


def test_the_sites_of_a_rotation_search_are_kept() -> None:
    text = with_search("calib_seqlen = 256\nmatmul_types = ['q_proj', 'kv_cache']\n")
    found = options_of(pipeline_of(text), "rotation-search")
    assert found == {"samples": 32, "length": 256, "sites": ["q_proj", "kv_cache"]}


def test_a_rotation_search_alone_brings_its_calibration() -> None:
    text = selector(LINEAR + INPUT) + "[rotation_search]\ncalib_data = 'c4'\ncalib_nsamples = 7\nmodel_name = 'a/b'\n"
    pipeline = pipeline_of(text)
    assert (pipeline.calibration.dataset, pipeline.calibration.samples, pipeline.model.name) == (
        "c4",
        7,
        "a/b",
    )


@pytest.mark.parametrize(
    ("text", "place", "said"),
    [
        ("by = 'type'", "1:1", "mxfx matches by module path"),
        ("by = 'regex_name'\nbypas = true", "2:1", "unknown key 'bypas'"),
        ("by = 'regex_name'\n[token_collector]\nseqlen = 1", "2:1", "lacks the key 'target_nsamples'"),
        (COLLECTOR.replace("seqlen = 16", "seqlen = 0"), "4:1", "1 or more"),
        (COLLECTOR + "nsamples = 1", "6:1", "did you mean 'target_nsamples'?"),
        (COLLECTOR, "2:1", "nothing to compile"),
        ("by = 'regex_name'\n[rotation]\nonline_rotate = true", "2:1", "'rotation'"),
        (selector(LINEAR, "(m"), "2:1", "no regular expression"),
        (selector("weight_width = 4"), "2:1", "lacks the key 'name'"),
        (selector("name = 'mxnit'"), "3:8", "did you mean 'mxint'?"),
        (selector("name = 'integer'"), "3:1", "no MX format"),
        (selector(LINEAR + "weight_frac_width = 3"), "6:1", "mxint takes weight_width and weight_block_size"),
        (selector("name = 'mxint'\nweight_width = 4"), "2:1", "lacks the key 'weight_block_size'"),
        (selector(LINEAR.replace("32", "0")), "4:16", "block size '0'"),
        (selector(LINEAR + "data_in_with = 4"), "6:1", "did you mean 'data_in_width'?"),
        (selector(LINEAR + "prefill = {}"), "4:1", "unknown key 'weight_width'"),
        (selector(LINEAR + "decode_policy = 'fp_only'"), "6:1", "'decode_policy'"),
        (selector(LINEAR + "online_rotate = true"), "6:1", "mxint_rotate"),
        (selector("name = 'mxint'"), "2:1", "sets no format"),
        (selector(LINEAR + "gptq = true"), "6:1", "no [gptq] table"),
        (selector(LINEAR.replace("4", "12")), "4:16", "there is no mxint12"),
        (selector("name = 'mxfp'\nweight_exponent_width = 2\nweight_frac_width = 2\nweight_block_size = 32"),
         "4:1", "E2M2 is no element of an MXFP format"),
        (selector("name = 'minifloat'\n" + FLOAT_WEIGHT + "weight_round_mode = 'stochastic'"),
         "6:21", "one of rn, rd, ru, rz"),
        (selector("name = 'minifloat'\nvector_format = 'E6M5'"), "4:17", "such as FP_E6M5"),
        (selector("name = 'minifloat'\n" + FLOAT_INPUT, r"model\.layers\.\d+"), "3:1", "residual stream"),
        (selector(LINEAR.replace("mxint", "mxint_rotate")), "3:1", "unless the input is quantized"),
        (attention(kv_cache="data_in_width = 4"), "8:1", "lacks the key 'data_in_block_size'"),
        (attention().replace("'mxint'\n", "'mxint'\n" + INPUT), "4:1", "multiplies by no data_in of its own"),
        (attention(kv_cache="bypas = true"), "9:1", "did you mean 'bypass'?"),
        (attention(kv_cache=""), "8:1", "gives no format"),
        (attention(kv_cache=INPUT + "rotate = true"), "11:1", "'mxint_rotate' or 'mxfp_rotate'"),
        (attention().replace("['a'.rope]\nbypass = true\n", ""), "2:1", "says nothing about rope"),
        (with_gptq("nsample = 3\n"), "4:1", "did you mean 'nsamples'?"),
        (with_gptq("nsamples = '3'\n"), "4:12", "expected: a whole number"),
        (with_gptq("phase = 'prefill'\n"), "4:1", "no selector has a bucket"),
        (with_gptq().replace("weight_width = 4", "weight_width = 8", 1), "9:16", "wants weights in mxint4"),
        (with_gptq().replace("format = 'mxint'\n", ""), "2:1", "lacks the key 'format'"),
        (with_gptq("percdamp = 0.1\n"), "4:1", "unknown key 'percdamp'"),
        (with_search("matmul_types = ['q_porj']"), "13:17", "did you mean 'q_proj'?"),
        (with_search("score_phase = 'decode'"), "13:1", "a search scores the whole model"),
        (with_search("improvement_epsilon = 0.0"), "13:1", "did you mean 'improvement_eps'?"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_at_its_place(text: str, place: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        pipeline_of(text)
    assert str(caught.value).startswith(f"t.toml:{place}: ")
    assert said in str(caught.value)


def test_a_pipeline_file_is_told_from_the_dialect(tmp_path: Path) -> None:
    file = tmp_path / "p.toml"
    file.write_text('[model]\nname = "a/b"\n[[pass]]\nname = "raise-norm"\n')
    assert load_any(file).model.name == "a/b"
    file.write_text(f"['m']\n{LINEAR}")
    assert names_of(load_any(file)) == [*RAISE, "annotate", "round-weights"]
    for more in ("", '[[pass]]\nname = "raise-norm"\n'):
        file.write_text(f'[modle]\nname = "a/b"\n{more}')
        with pytest.raises(ConfigError, match="did you mean 'model'"):
            load_any(file)
    file.write_text('by = "regex_name"\n')
    with pytest.raises(ConfigError, match=r"has no selectors(.|\n)*expected: quoted selectors"):
        load_any(file)


@pytest.mark.parametrize("file", TUTORIAL)
def test_no_pass_of_the_tutorial_is_warned_of(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``--strict`` takes them: what GPTQ put on the grid leaves nothing to round, and no rotation may be best."""
    monkeypatch.chdir(tmp_path)
    tokens = torch.randint(128, (32, 32), generator=torch.Generator().manual_seed(0))
    result = PassManager().run(traced("llama-tiny"), load_any(CONFIGS / file), Context(tokens=lambda: tokens))
    assert [record.warnings for record in result.records if record.warnings] == []
