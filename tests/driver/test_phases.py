"""A pipeline whose prefill and decode have formats of their own: files, commands, GPTQ, errors."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import mxfx as library
from mxfx.config import ConfigError, Pipeline, from_text, loads, to_text, to_toml
from mxfx.config.phases import of_phase
from mxfx.evaluation.evaluate import text_domain
from mxfx.export.artefact import load
from mxfx.graph.program import Program
from mxfx.pipeline.manager import PassManager
from mxfx.rewrite import Context
from mxfx.runtime.causal_lm import as_causal_lm
from tests.commands import Run
from tests.local_model import save_model, save_texts
from tests.programs import model, padded_batch, traced

PHASED = """
[model]
name = "MODEL"
dtype = "float32"
[phases]
handoff = "requantize"
[[phases.prefill.rule]]
role = "attention, mlp"
input = "mxint8@32"
[[phases.decode.rule]]
role = "attention, mlp"
input = "mxint4@32"
[[phases.decode.rule]]
role = "attention"
kv = "mxint4@16"
[[pass]]
name = "annotate"
  [[pass.rule]]
  role = "attention, mlp"
  weight = "mxint4@32"
[[pass]]
name = "round-weights"
[[pass]]
name = "insert-fake-quant"
[[pass]]
name = "quantize-kv-cache"
"""
GPTQ = PHASED.replace('name = "round-weights"', 'name = "gptq"\nquantized_inputs = true')


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(3, 128, (4, 32), generator=torch.Generator().manual_seed(0))


def compiled(text: str, tokens: Tensor | None = None) -> Program:
    """The portable program of a pipeline over the tiny model."""
    ctx = Context() if tokens is None else Context(tokens=lambda: tokens)
    pipeline = loads(text).emitted("cpu")
    return PassManager().run(traced("llama-tiny"), pipeline, ctx).portable


def test_the_forms_of_a_pipeline_keep_its_phases() -> None:
    pipeline = loads(PHASED)
    assert loads(to_toml(pipeline)) == pipeline == from_text(to_text(pipeline))
    assert pipeline.phases.decode.rule[1].kv is not None and pipeline.phases.handoff == "requantize"
    assert "phases" not in to_toml(loads("[[pass]]\nname = 'fuse-norm'\n"))


def test_a_phase_is_the_pipeline_with_its_rules_in_front() -> None:
    """To the bit: each program is what a pipeline of its own makes, and its rules stand where they were written."""
    pipeline = loads(PHASED, "p.toml")
    decode = of_phase(pipeline, "decode")
    at = next(i for i, spec in enumerate(decode.specs) if spec.name == "annotate")
    assert [str(decode.location(at, ("rule", i, "match"))).split(":")[1] for i in range(3)] == ["10", "13", "18"]
    both, ids = compiled(PHASED), padded_batch()[0]
    assert both.phases is not None
    for phase, program in (("prefill", both), ("decode", both.phases.decode)):
        alone = PassManager().run(traced("llama-tiny"), of_phase(pipeline, phase).emitted("cpu")).portable
        expected, found = (as_causal_lm(one)(ids, phase=phase).logits for one in (alone, program))
        assert torch.equal(expected, found)


def test_passes_before_the_phases_part_run_once() -> None:
    result = PassManager().run(traced("llama-tiny"), loads(PHASED).emitted("cpu"))
    ran = [(step.pass_.name, step.phase) for step in result.steps]
    assert ran[3:8] == [
        ("split-fused", ""), ("annotate", "decode"), ("annotate", "prefill"),
        ("round-weights", "decode"), ("round-weights", "prefill"),
    ]  # fmt: skip
    assert [step.index for step in result.steps] == list(range(1, len(ran) + 1))
    assert not [text for step in result.steps for text in step.record.warnings]


def test_gptq_calibrates_in_one_phase_and_the_other_takes_its_weights(tokens: Tensor) -> None:
    """With decode's formats (the default) the weights are those of decode alone; with the prefill's, of that alone."""
    for text, phase in (
        (GPTQ, "decode"),
        (GPTQ.replace("inputs = true", 'inputs = true\nphase = "prefill"'), "prefill"),
    ):
        both = compiled(text, tokens)
        without = of_phase(loads(GPTQ), phase)
        alone = PassManager().run(traced("llama-tiny"), without.emitted("cpu"), Context(tokens=lambda: tokens)).portable
        assert both.phases is not None
        assert {both.weights.hash(name) for name in both.weights} == {
            alone.weights.hash(name) for name in alone.weights
        }
        assert all(both.phases.decode.weights[name] is both.weights[name] for name in both.weights)
    other = compiled(GPTQ, tokens)
    assert {other.weights.hash(n) for n in other.weights} != {both.weights.hash(n) for n in both.weights}


def test_gptq_calibrates_what_the_other_phase_has_in_another_format(tokens: Tensor) -> None:
    text = GPTQ.replace(
        "[[phases.prefill.rule]]",
        '[[phases.prefill.rule]]\nrole = "mlp"\nweight = "mxint8@32"\n[[phases.prefill.rule]]',
        1,
    )
    both = compiled(text, tokens)
    assert both.phases is not None
    decode = both.phases.decode
    shared = {name for name in both.weights if name in decode.weights and decode.weights[name] is both.weights[name]}
    assert any("self_attn" in name for name in shared) and not any("mlp" in name for name in shared)


def test_a_prefill_in_float_keeps_its_weights(tokens: Tensor) -> None:
    head, _, tail = GPTQ.partition("[[phases.prefill.rule]]")
    rules = tail[tail.index("[[phases.decode") : tail.index("[[pass]]")]
    own = rules + '[[phases.decode.rule]]\nrole = "attention, mlp"\nweight = "mxint4@32"\n'
    passes = tail[tail.index("[[pass]]") :].replace(
        '  [[pass.rule]]\n  role = "attention, mlp"\n  weight = "mxint4@32"\n', ""
    )
    both, ids = compiled(head + own + passes, tokens), padded_batch()[0]
    assert both.phases is not None and "mxint4" not in str(both.graph)
    assert torch.equal(
        as_causal_lm(both)(ids).logits,
        as_causal_lm(
            compiled(
                "[[pass]]\nname = 'raise-norm'\n[[pass]]\nname = 'raise-rope'\n[[pass]]\nname = 'raise-attention'\n"
            )
        )(ids).logits,
    )


ERRORS = {
    "no rules": ('[phases]\nhandoff = "keep"\n[[pass]]\nname = "fuse-norm"', "1:1", "has no rules: both phases"),
    "no annotate": ('[[phases.decode.rule]]\ninput = "mxint4@32"\n[[pass]]\nname = "fuse-norm"', "1:", "lacks"),
    "a misspelt key": ('[phases]\nhand = "keep"', "2:1", "unknown key 'hand' in [phases]"),
    "a third phase": ('[[phases.train.rule]]\ninput = "mxint4@32"', "1:", "unknown key 'train' in [phases]"),
    "another handoff": (PHASED.replace('"requantize"', '"fp"'), "6:11", "'fp' is not one of the choices"),
    "a rule without a format": ('[[phases.decode.rule]]\nrole = "mlp"', "2:8", "names no format"),
    "a pass that tunes behind": (PHASED.replace('"round-weights"', '"scale-channels"'), "22:8", "two models of one"),
    "gptq's phase without phases": ('[[pass]]\nname = "gptq"\nphase = "decode"', "3:9", "the pipeline has no phases"),
    "gptq in two phases": (
        GPTQ.replace('inputs = true', 'inputs = true\nphase = "decode"\n[[pass]]\nname = "gptq"\nphase = "prefill"'),
        "27:9",
        "another gptq of the pipeline has 'decode'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("text, place, problem", ERRORS.values(), ids=ERRORS)
def test_phases_that_cannot_be_are_one_error_at_their_line(text: str, place: str, problem: str) -> None:
    from mxfx.config import check_order

    with pytest.raises(ConfigError, match=re.escape(problem)) as caught:
        check_order(loads(text, "p.toml"))
    assert f"p.toml:{place}" in str(caught.value)


def test_a_phase_whose_attention_is_spelled_out_is_refused() -> None:
    text = PHASED.replace('kv = "mxint4@16"', 'probs = "mxint8@32"').replace(
        '"quantize-kv-cache"', '"expand-attention"'
    )
    text = text.replace(
        'name = "insert-fake-quant"\n[[pass]]\nname = "expand-attention"',
        'name = "expand-attention"\n[[pass]]\nname = "insert-fake-quant"',
    )
    with pytest.raises(Exception, match="prefill has 2 attentions that a cache can serve, decode has 0"):
        compiled(text)


def test_commands_say_the_phases(folder: Path, mxfx: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p.toml").write_text(PHASED.replace("MODEL", str(folder)))
    save_texts(Path("texts"))
    checked = mxfx("check", "p.toml", "--context", 1000)
    assert checked.code == 0, checked.err
    assert "decode: rule 2" in checked.out and "prefill: rule 1" in checked.out
    assert "bits per weight after rounding: prefill" in checked.out
    # 2 layers × keys and values × 2 heads × 16 channels: codes and a scale; a float cache beside them in a prefill.
    assert f"cache: {8 * 1000 * 9 / 1e9:.3f} GB" in checked.out and "; a prefill takes 0.001 GB more" in checked.out
    assert loads(mxfx("config", "show", "p.toml").out).phases.given
    ran = mxfx("run", "p.toml", "--eval", "wikitext", "--eval-data", "texts", "--out", "out", "-v")
    assert ran.code == 0, ran.err
    assert "p decode" in ran.out and "its program of single steps" in ran.out and "annotate (decode)" in ran.out
    configs = {one["name"]: one for one in json.loads(Path("out/results.json").read_text())["configs"]}
    assert configs["p"]["phase"] == "prefill" and configs["p decode"]["phase"] == "decode"
    assert {one.get("phase") for one in configs["p"]["passes"]} == {None, "prefill", "decode"}
    assert "(decode)" in Path("out/p/ir/index.md").read_text()
    found = {phase: mxfx("eval", "out", "--eval-data", "texts", "--phase", phase) for phase in ("prefill", "decode")}
    for phase, name in (("prefill", "p"), ("decode", "p decode")):
        assert found[phase].code == 0, found[phase].err
        figure = configs[name]["figures"]["token_perplexity"]
        assert f"{figure:.4f}" in found[phase].out, "what the run said of a phase, its files say again"
    written = mxfx("generate", "out", "--prompt", "w3 w5 w8", "--max-new-tokens", 6, "--greedy")
    assert written.code == 0 and re.fullmatch(r"(w\d+ ?)+\n", written.out), written.err
    assert mxfx("eval", "out", "--phase", "both").code == 2
    refused = mxfx("export", "out", "--to", "hf", "--out", "new")
    assert refused.code == 2 and "one for decode; export a model without phases" in refused.err
    refused = mxfx("bisect", "out")
    assert refused.code != 0 and "one for each phase" in refused.err


def test_decode_is_scored_as_a_loop_by_hand_scores_it(folder: Path, mxfx: Run, tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text(PHASED.replace("MODEL", str(folder)))
    save_texts(tmp_path / "texts")
    assert mxfx("run", tmp_path / "p.toml", "--out", tmp_path / "out").code == 0
    said = mxfx("eval", tmp_path / "out", "--eval-data", tmp_path / "texts", "--phase", "decode")
    home = tmp_path / "out" / "p" / "model"
    program, tokenizer = load(home), AutoTokenizer.from_pretrained(home)
    assert program.phases is not None
    alone = as_causal_lm(program.phases.decode)
    domain = text_domain("wikitext", tokenizer, path=tmp_path / "texts", max_length=256)
    total = count = 0.0
    for window in domain.windows:
        held = alone.new_cache()
        for at, token in enumerate(window.ids):
            logits = alone(token.reshape(1, 1), past_key_values=held).logits[0, -1]
            index = at - (len(window.ids) - window.scored)
            if index >= 0:
                total -= float(logits.float().log_softmax(-1)[window.targets[index]])
                count += 1
    assert f"{math.exp(total / count):.3f}" in said.out
    lm = AutoModelForCausalLM.from_pretrained(home)
    assert lm.generate(torch.tensor([[5, 8, 11]]), max_new_tokens=4, do_sample=False).shape[1] <= 7


def test_a_pipeline_without_phases_writes_the_bytes_that_it_wrote(folder: Path, tmp_path: Path) -> None:
    """Held by a pipeline whose phases are alike: its prefill is the pipeline without them, byte for byte."""
    from mxfx.export.artefact import save

    text = PHASED[: PHASED.index("[phases]")] + PHASED[PHASED.index("[[pass]]") :]
    rule = '[[phases.RULE.rule]]\nrole = "attention"\nkv = "mxint4@16"\n'
    alike = rule.replace("RULE", "prefill") + rule.replace("RULE", "decode") + text
    plain = compiled(
        text.replace("  [[pass.rule]]", "  [[pass.rule]]\n  role = 'attention'\n  kv = 'mxint4@16'\n  [[pass.rule]]", 1)
    )
    both = compiled(alike)
    save(plain, tmp_path / "plain")
    save(both, tmp_path / "both")
    assert {file.name for file in (tmp_path / "plain").iterdir()} == {
        "manifest.json",
        "program.mxir",
        "weights.safetensors",
    }
    names = ("weights.safetensors",)
    assert [(tmp_path / "plain" / n).read_bytes() for n in names] == [
        (tmp_path / "both" / n).read_bytes() for n in names
    ]


def test_compile_gives_a_module_whose_program_has_both(tokens: Tensor) -> None:
    module = library.compile(model("llama-tiny"), loads(PHASED), tokens=tokens)
    ids, mask, _ = padded_batch()
    written = [
        as_causal_lm(one).generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, eos_token_id=None)
        for one in (module.program, module.report.program, module.report.portable)
    ]
    assert torch.equal(written[0], written[1]) and torch.equal(written[0], written[2])
    assert isinstance(loads(PHASED), Pipeline)


def test_check_says_of_each_phase_how_its_linears_run(mxfx: Run, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "p.toml"
    file.write_text(PHASED.replace("MODEL", str(folder)))
    said = mxfx("check", file, "--device", "cuda")
    assert said.code == 0, said.err
    told = " ".join(said.out.split())
    assert "prefill: linears: 14 " in told and "its input is mxint8@32, of which E4M3" in told
    assert "decode: linears: " in told and "FP8 tensor cores, exact sums" in told
    assert told.count("lm_head, float32: a GEMM in float32") == 1, "what both have in common once"
