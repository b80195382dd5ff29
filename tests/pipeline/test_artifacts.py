"""What a run leaves on disk and on the screen: dumps, reproducers, coverage, ``opt``."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import ClassVar

import pytest

from mxfx.config import from_text
from mxfx.graph.text import parse, to_text
from mxfx.passes import PackWeights
from mxfx.pipeline.instruments import Dump, Reproduce, Timing
from mxfx.pipeline.manager import PassError, PassManager
from mxfx.pipeline.opt import opt
from mxfx.pipeline.reproduce import one_layer, reproduce
from mxfx.report.coverage import coverage
from mxfx.rewrite import Lossy, Pass, apply
from mxfx.rewrite.pass_ import _REGISTRY, register

RAISE = "raise-norm,raise-rope,raise-attention"
QUANTIZE = "annotate{rule=[{match='.*_proj',weight=mxint4@32,input=mxint4@32}]},insert-fake-quant,round-weights"


@dataclass(frozen=True)
class DownProjFails(Pass):
    """Fails at a layer's down projection."""

    name: ClassVar[str] = "down-proj-fails"
    numerics: ClassVar = Lossy()

    def run(self, rw, ctx):
        for node in rw.program.nodes("linear"):
            if "down_proj" in str(node.args[1].target):
                raise ArithmeticError(f"no solution at {node.name}")


@pytest.fixture(autouse=True)
def plugged_in():
    known = dict(_REGISTRY)
    register(DownProjFails)
    yield
    _REGISTRY.clear()
    _REGISTRY.update(known)


def test_a_dump_has_a_folder_a_pass_and_an_index(program, tmp_path):
    PassManager([Dump(tmp_path), Timing()]).run(program("llama-tiny", "traced"), from_text(RAISE))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "000_trace", "001_raise-norm", "002_raise-rope", "003_raise-attention", "index.md"
    ]  # fmt: skip
    assert "| 1 | raise-norm | 5, 0 skipped |" in (tmp_path / "index.md").read_text()
    assert len(json.loads((tmp_path / "002_raise-rope/matches.json").read_text())["matched"]) == 4
    assert "+ %rms_norm_default" in (tmp_path / "001_raise-norm/diff.txt").read_text()
    assert not list(tmp_path.rglob(".*"))


def test_a_dumped_graph_reads_back(program, tmp_path):
    PassManager([Dump(tmp_path)]).run(program("llama-tiny", "traced"), from_text(RAISE))
    text = (tmp_path / "002_raise-rope/graph.txt").read_text()
    assert to_text(parse(text)) == text


def test_a_pass_that_changes_nothing_dumps_no_graph(program, tmp_path):
    PassManager([Dump(tmp_path)]).run(program("llama-tiny", "traced"), from_text(RAISE))
    assert not (tmp_path / "003_raise-attention/graph.txt").exists()
    assert (tmp_path / "003_raise-attention/matches.json").exists()


def test_a_failure_leaves_a_folder_that_fails_again(program, tmp_path):
    with pytest.raises(PassError, match=r"no solution at linear_6"):
        PassManager([Reproduce(tmp_path)]).run(program("llama-tiny", "traced"), from_text(f"{RAISE},down-proj-fails"))
    assert (tmp_path / "passes.txt").read_text() == "down-proj-fails\n"
    found = reproduce(tmp_path)
    assert found.same and "no solution at linear_6" in str(found.error)


def test_a_reproducer_is_cut_to_one_layer(program, tmp_path):
    with pytest.raises(PassError):
        PassManager([Reproduce(tmp_path)]).run(program("llama-tiny", "raised"), from_text("down-proj-fails"))
    found = reproduce(tmp_path, shrink=True)
    assert found.same and found.shrunk == tmp_path / "shrunk"
    assert reproduce(tmp_path / "shrunk").same
    small = parse((tmp_path / "shrunk/graph.txt").read_text())
    assert not any("layers.1" in name for name in small.weights)


@pytest.mark.parametrize("layer", [0, 1])
def test_one_layer_of_a_model_is_a_whole_program(program, layer):
    from mxfx.graph.verify import verify

    small = one_layer(program("qwen3-tiny", "raised"), layer)
    assert verify(small) > 20
    assert {n.split(".")[2] for n in small.weights if "layers." in n} == {str(layer)}


def test_coverage_names_format_rule_and_reason(program):
    result = PassManager().run(program("llama-tiny", "raised"), from_text(QUANTIZE))
    report = coverage(result.program, result.records)
    rows = {(r.path, r.operand): r for r in report.rows}
    up = rows["model.layers.0.mlp.up_proj", "weight"]
    assert (up.format, up.by, up.state) == ("mxint4@32", "annotate rule 1", "rounded")
    assert rows["lm_head", "weight"].reason == "no rule speaks of it"
    gemms = {g.path: g for g in report.gemms}
    assert gemms["model.layers.0.mlp.up_proj"].four_bit
    assert not gemms["lm_head"].four_bit and "weight is float" in gemms["lm_head"].reason


def test_bits_per_weight_count_everything(program):
    result = PassManager().run(program("llama-tiny", "raised"), from_text(QUANTIZE))
    report = coverage(result.program)
    stored = {n: t.numel() for n, t in result.program.weights.items()}
    rounded = sum(c for n, c in stored.items() if "_proj" in n)
    expected = (rounded * (4 + 8 / 32) + (sum(stored.values()) - rounded) * 32) / sum(stored.values())
    assert report.weight_bits == pytest.approx(expected)
    packed = coverage(apply(PackWeights(), result.program).program)
    assert (packed.weight_bits, packed.parameters) == (pytest.approx(expected), report.parameters)


def test_opt_prints_what_opt_reads(tmp_path):
    text = opt("llama-tiny", RAISE, verify_each=True)
    path = tmp_path / "graph.txt"
    path.write_text(text)
    assert opt(path) == text
    assert "facts annotated" in opt(path, "annotate{rule=[{match='.*q_proj',weight=mxint4@32}]}")


def test_opt_prints_edited_regions_only():
    text = opt("llama-tiny", RAISE, print_ir_after_change=True)
    assert text.count("// pass") == 2
    assert len(text.splitlines()) < 70


def test_opt_prints_every_match_of_every_pass_apart():
    text = opt("llama-tiny", f"{RAISE},rotate-value", print_ir_per_match=True)
    pieces = ["// " + piece for piece in text.split("// ")[1:]]
    assert [re.match(r"// pass (\d) .*: match (\d) of (\d) at", piece).groups() for piece in pieces] == [
        *(("1", str(match), "5") for match in range(1, 6)),
        *(("2", str(match), "4") for match in range(1, 5)),
        *(("4", str(match), "2") for match in range(1, 3)),
    ]
    assert all(len(re.findall(r"^\+ .*= mxfx.rms_norm", piece, re.M)) == 1 for piece in pieces[:5])
    assert all(len(re.findall(r"^- .*= aten.rsqrt", piece, re.M)) == 1 for piece in pieces[:5])
    assert [piece.count("aten.neg(") for piece in pieces[5:9]] == [
        1,
        1,
        1,
        1,
    ]  # one half turned in each rotary embedding
    for layer, piece in enumerate(pieces[9:]):
        assert re.findall(r"^\+ @(\S+) :", piece, re.M) == [
            f"model.layers.{layer}.self_attn.v_proj.weight",
            f"model.layers.{layer}.self_attn.o_proj.weight",
        ]


def test_opt_prints_first_what_belongs_to_no_match():
    text = opt("llama-tiny", f"{RAISE},insert-kv-cache", print_ir_per_match=True)
    outside, first = text.split("// pass 4 ")[1:3]
    assert "apart from its 2 matches" in outside and "+ %slots = input" in outside and "cache_0" not in outside
    assert "match 1 of 2" in first and "+ %cache_0_keys = input" in first and "cache_1" not in first


def test_opt_prints_once_what_is_not_done_by_halves():
    text = opt("llama-tiny", f"{RAISE},lower", print_ir_per_match=True)
    assert text.count("// pass 4 ") == 1 and re.search(r"// pass 4 .*: its \d+ matches are one edit\n@@", text)
    assert "- %rms_norm_default" in text.split("// pass 4 ")[1]


def test_opt_prints_whole_graphs_around_named_passes_and_times():
    text = opt("llama-tiny", RAISE, print_ir_before=["raise-rope"], print_ir_after=["all"], timing=True)
    assert text.count("// before pass 2 'raise-rope'") == 1 and text.count("// after pass") == 3
    assert "total" in text


def test_opt_stops_inside_a_pass():
    assert opt("llama-tiny", RAISE, stop_after="1.2").count("mxfx.rms_norm(") == 2


@pytest.mark.parametrize(("stop", "has"), [("4", "has 3 passes"), ("1.6", "pass 1 'raise-norm' has 5 matches")])
def test_opt_stops_nowhere_else(stop, has):
    with pytest.raises(ValueError, match=re.escape(f"--stop-after {stop}: ") + ".*" + re.escape(has)):
        opt("llama-tiny", RAISE, stop_after=stop)
    assert opt("llama-tiny", RAISE, stop_after=stop.replace("4", "3").replace("1.6", "1.5"))


def test_opt_names_the_nearest_model():
    with pytest.raises(ValueError, match=r"did you mean 'llama-tiny'"):
        opt("lama-tiny")
