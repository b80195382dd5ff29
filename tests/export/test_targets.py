"""Exports open in the other library with the same codes and logits, or are refused with the reason."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from mxfx.config import loads
from mxfx.export import target as module
from mxfx.export.errors import ExportError
from mxfx.export.nvfp4 import find_nvfp4
from mxfx.export.plain import plain
from mxfx.export.target import Written, export, targets
from mxfx.formats import parse
from mxfx.graph.program import Program
from mxfx.graph.tiny import tiny
from mxfx.graph.trace import trace
from mxfx.pipeline.manager import PassManager
from tests.architectures import build

_ROUNDED = """
[[pass]]
name = "fuse-norm"
[[pass]]
name = "annotate"
  [[pass.rule]]
  match  = '.*_proj'
  weight = "{weight}"
  {more}
[[pass]]
name = "round-weights"
"""
_QUANTIZED = '[[pass]]\nname = "insert-fake-quant"\n'
_CACHE = """[[pass.rule]]
  match = '.*self_attn'
  kv    = "mxint4@32"
"""
_HADAMARD = '[[pass]]\nname = "transform-inputs"\nkind = "hadamard"\nblock = 32\n'
_KEYS = '[[pass]]\nname = "rotate-qk"\n'


@cache
def _model(family: str):
    """In bfloat16 as a loaded model is: weights are cast, rotary frequencies are not."""
    return _in_bfloat16(tiny(family))


def _in_bfloat16(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return model


@cache
def _program(weight: str, *, more: str = "", before: str = "", after: str = "", family: str = "llama-tiny") -> Program:
    text = before + _ROUNDED.format(weight=weight, more=more) + after
    return PassManager().run(trace(_model(family)), loads(text).completed()).program


def _weight(program: Program, name: str) -> torch.Tensor:
    return program.weights[name].to(torch.bfloat16)


_PROJ = "model.layers.1.mlp.down_proj"


def test_a_full_disk_is_an_error_that_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """safetensors and gguf raise their own kinds, without a path."""
    program = (
        PassManager().run(trace(_model("llama-tiny")), loads(_ROUNDED.format(weight="mxint4@32", more=""))).program
    )
    for error in (SafetensorError("I/O error: No space left on device"), OSError(28, "No space left on device")):

        def full(*args: object, error: Exception = error, **options: object) -> None:
            raise error

        monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
        with pytest.raises(
            ExportError, match=r"new cannot be written: .*No space left on device.*; free space"
        ) as caught:
            export(program, tmp_path / "new", "hf")
        assert caught.value.exit_code == 2 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("family", "weight"),
    [("llama-tiny", "mxint4@32/mse"), ("gemma3-tiny", "mxfp4_e2m1@32"), ("phi3-tiny", "mxint8@16")],
)
def test_a_plain_model_opens_with_the_rounded_weights(weight: str, family: str, tmp_path: Path) -> None:
    written = export(_program(weight, family=family), tmp_path / "out", "hf")
    assert written.checks["relative error of float32 logits"] <= 1e-5
    assert written.checks["of them quantized"] >= 8
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False


def test_how_the_source_generates_goes_along(tmp_path: Path) -> None:
    """Texts of a chat model end with any of several tokens, which its configuration does not name."""
    model = _in_bfloat16(tiny("llama-tiny"))
    model.generation_config = GenerationConfig(eos_token_id=[2, 7], temperature=0.6, do_sample=True)
    text = _ROUNDED.format(weight="mxint4@32", more="")
    program = PassManager().run(trace(model), loads(text).completed()).program
    for to in ("hf", "compressed-tensors"):
        export(program, tmp_path / to, to)
        found = GenerationConfig.from_pretrained(tmp_path / to)
        assert (found.eos_token_id, found.temperature, found.do_sample) == ([2, 7], 0.6, True)
        assert "generation_config" not in json.loads((tmp_path / to / "config.json").read_text())


#: An architecture that stores weights as ``(in, out)`` → how many of them a rule by role takes: all, or the experts'.
_TURNED = {"gpt2": 8, "gpt_oss": 12}


@cache
def _turned(name: str) -> Program:
    model = _in_bfloat16(build(name))
    rules = "".join(f"[[pass.rule]]\nrole = '{role}'\nweight = 'mxint4@16'\n" for role in ("attention", "mlp"))
    text = f'[[pass]]\nname = "annotate"\n{rules}[[pass]]\nname = "round-weights"\n'
    return PassManager().run(trace(model), loads(text).completed()).program


@pytest.mark.parametrize("name", _TURNED)
def test_weights_that_the_source_keeps_turned_are_written_as_it_keeps_them(name: str, tmp_path: Path) -> None:
    written = export(_turned(name), tmp_path / "out", "hf")
    assert written.checks["of them quantized"] == _TURNED[name]
    with pytest.raises(ExportError, match=r"as \(in, out\): its blocks run along the first axis"):
        export(_turned(name), tmp_path / "other", "compressed-tensors")


@pytest.mark.parametrize(
    ("weight", "scheme", "bits"),
    [
        ("mxfp4_e2m1@32/mse", "mxfp4-pack-quantized", 4.25),
        ("mxfp8_e4m3@32", "mxfp8-quantized", 8.25),
        ("mxint4@32/mse", "pack-quantized", 4.5),
        ("mxint8@32/ceil", "pack-quantized", 8.5),
    ],
)
def test_compressed_tensors_reads_the_codes(weight: str, scheme: str, bits: float, tmp_path: Path) -> None:
    program = _program(weight, more=f'input = "{weight}"', after=_QUANTIZED)
    written = export(program, tmp_path / "out", "compressed-tensors")
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["format"] == scheme
    assert written.checks["relative error of float32 logits"] <= 1e-5
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys() if name.startswith(_PROJ)}  # noqa: SIM118
    elements = _weight(program, f"{_PROJ}.weight").numel()
    payload = sum(t.nbytes for name, t in stored.items() if not name.endswith("_shape"))
    assert payload * 8 / elements == bits


def test_only_linears_whose_inputs_are_rounded_are_said_to_round_them(tmp_path: Path) -> None:
    """Attention rounds weights alone, the head nothing."""
    rules = "match = '.*mlp.*_proj'\nweight = 'mxint8@32'\ninput = 'mxint8@32'\n[[pass.rule]]\nmatch = '.*_proj'\n"
    text = _ROUNDED.format(weight="mxint8@32", more="").replace("match  = '.*_proj'\n", rules) + _QUANTIZED
    program = PassManager().run(trace(_model("qwen2-tiny")), loads(text).completed()).program
    export(program, tmp_path / "out", "compressed-tensors")
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    rounds = {
        path: group["input_activations"] for group in config["config_groups"].values() for path in group["targets"]
    }
    assert len(rounds) == 14 and config["ignore"] == ["lm_head"]
    assert [path for path, how in rounds.items() if how is not None] == [path for path in rounds if ".mlp." in path]


def test_nvfp4_weights_are_stored_with_codes_that_the_library_reads(tmp_path: Path) -> None:
    """Scales and elements are those of the format; its reader's own arithmetic gives the bits of the weights."""
    program = _program("nvfp4")
    written = export(program, tmp_path / "out", "compressed-tensors")
    assert json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["format"] == (
        "nvfp4-pack-quantized"
    )
    assert written.checks["of them quantized"] == 14 and written.checks["relative error of float32 logits"] <= 1e-5
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        packed, scales, divisor = (
            file.get_tensor(f"{_PROJ}.weight_{part}") for part in ("packed", "scale", "global_scale")
        )
    assert (packed.dtype, scales.dtype, divisor.shape) == (torch.uint8, torch.float8_e4m3fn, (1,))
    weight = program.weights[f"{_PROJ}.weight"]
    assert (packed.nbytes + scales.nbytes) * 8 / weight.numel() == 4.5
    fmt = parse("nvfp4")
    elements = fmt.element.from_codes(fmt.unpack(packed, weight.shape[1]), torch.float32)
    decoded = elements * (scales.float() / divisor).repeat_interleave(16, -1)
    assert torch.equal(decoded.bfloat16(), _weight(program, f"{_PROJ}.weight"))


def test_nvfp4_codes_are_found_wherever_the_numbers_come_from() -> None:
    generator = torch.Generator().manual_seed(0)
    fmt = parse("nvfp4")
    for case in range(24):
        weight = torch.randn(64, 256, generator=generator) * 10.0 ** (case - 12)
        weight = (
            weight * torch.exp(2 * torch.randn(64, 1, generator=generator)) if case % 2 else weight.bfloat16().float()
        )
        on_grid = fmt.fake_quantize(weight).bfloat16()
        # A part of a tensor, and one whose largest number is gone, have the scale of the whole.
        part = on_grid[:, 16:].contiguous() if case % 3 else on_grid.where(on_grid.abs() < on_grid.abs().max(), 0)
        found = find_nvfp4(part)
        assert found is not None and torch.equal(found.read(), part), case
    assert find_nvfp4(torch.randn(64, 256, generator=generator).bfloat16()) is None
    assert find_nvfp4(fmt.fake_quantize(torch.randn(64, 256, generator=generator))) is None
    assert find_nvfp4(torch.zeros(4, 32)).read().count_nonzero() == 0


_FLOATS = {"F64", "F32", "F16", "BF16"}


@pytest.mark.parametrize("weight", ["mxfp4_e2m1@32/mse", "mxfp8_e4m3@32", "mxint4@32/mse", "mxint8@32/ceil", "nvfp4"])
def test_no_tensor_that_the_configuration_calls_quantized_is_float_in_the_file(weight: str, tmp_path: Path) -> None:
    export(_program(weight), tmp_path / "out", "compressed-tensors")
    groups = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["config_groups"]
    targets = [path for group in groups.values() for path in group["targets"]]
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    assert len(targets) == 14
    for path in targets:
        payload = [kinds[name] for name in (f"{path}.weight", f"{path}.weight_packed") if name in kinds]
        assert len(payload) == 1 and payload[0] not in _FLOATS, path


def test_an_mxfp4_file_holds_the_formats_own_codes(tmp_path: Path) -> None:
    program = _program("mxfp4_e2m1@32")
    export(program, tmp_path / "out", "compressed-tensors")
    fmt = parse("mxfp4_e2m1@32")
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        codes = fmt.unpack(file.get_tensor(f"{_PROJ}.weight_packed"), 96)
        scales = file.get_tensor(f"{_PROJ}.weight_scale")
    from mxfx.formats import Encoded

    decoded = fmt.decode(Encoded(codes, scales, -1, torch.float32), torch.bfloat16)
    assert torch.equal(decoded, _weight(program, f"{_PROJ}.weight"))


@pytest.mark.parametrize(
    ("weight", "kind"), [("mxfp4_e2m1@32", "MXFP4"), ("mxint4@32/mse", "Q4_0"), ("mxint8@32", "Q8_0")]
)
def test_gguf_holds_the_codes_in_its_own_types(weight: str, kind: str, tmp_path: Path) -> None:
    from gguf import GGUFReader, dequantize

    program = _program(weight)
    written = export(program, tmp_path / "out", "gguf")
    assert written.checks["relative error of float32 logits"] <= 1e-5
    reader = GGUFReader(tmp_path / "out/model.gguf")
    assert [reader.fields[f"llama.attention.{name}_length"].contents() for name in ("key", "value")] == [16, 16]
    tensors = {t.name: t for t in reader.tensors}
    linears = [t for name, t in tensors.items() if name.startswith("blk.") and "norm" not in name]
    assert len(linears) == 14 and {t.tensor_type.name for t in linears} == {kind}
    down = tensors["blk.1.ffn_down.weight"]
    assert down.tensor_type.name == kind
    expected = _weight(program, f"{_PROJ}.weight").float().numpy()
    assert np.array_equal(dequantize(down.data, down.tensor_type), expected)


#: How Llama 3 cuts a text into words.
_LLAMA = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def _bpe(pre_tokenizer: pre_tokenizers.PreTokenizer) -> PreTrainedTokenizerFast:
    """A token that opens every text, one of a chat's template, one that a user added; 128 words."""
    words = {chr(0x21 + i): i for i in range(64)}
    bpe = Tokenizer(models.BPE({**words, "AB": 64}, [("A", "B")]))
    bpe.pre_tokenizer = pre_tokenizer
    bpe.add_special_tokens([AddedToken(text, special=True) for text in ("<s>", "</s>", "<|turn|>")])
    bpe.add_tokens([AddedToken("<tool>", special=False)])
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 65)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


def test_a_gguf_file_has_the_tokenizer_and_what_kind_each_token_is(tmp_path: Path) -> None:
    from gguf import GGUFReader, TokenType

    tokenizer = _bpe(pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel()]))
    export(_program("mxint4@32/mse"), tmp_path / "out", "gguf", tokenizer=tokenizer)
    fields = GGUFReader(tmp_path / "out/model.gguf").fields
    held = {name.removeprefix("tokenizer.ggml."): field.contents() for name, field in fields.items()}
    assert (held["model"], held["tokens"][64:69]) == ("gpt2", ["AB", "<s>", "</s>", "<|turn|>", "<tool>"])
    assert held["token_type"][64:70] == [
        TokenType.NORMAL, *[TokenType.CONTROL] * 3, TokenType.USER_DEFINED, TokenType.UNUSED,
    ]  # fmt: skip
    assert (held["merges"], held["bos_token_id"], held["eos_token_id"]) == (["A B"], 65, 66)
    assert (held["add_bos_token"], held["add_eos_token"]) == (True, False)


@pytest.mark.parametrize(
    ("parts", "name"),
    [
        ([pre_tokenizers.ByteLevel(add_prefix_space=False)], "gpt-2"),
        ([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)], "smollm"),
        ([pre_tokenizers.Split(Regex(_LLAMA), "isolated"), _BYTES], "llama-bpe"),
        ([pre_tokenizers.Split(Regex(_LLAMA.replace("{1,3}", "")), "isolated"), _BYTES], "qwen2"),
        ([pre_tokenizers.Split(Regex(r"\s+"), "isolated"), _BYTES], None),
        ([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=False)], None),
    ],
)
def test_llama_cpp_cuts_texts_as_the_tokenizer_does_or_the_user_is_told(parts, name, tmp_path: Path) -> None:
    """A digit merged with the next one is another token."""
    from gguf import GGUFReader

    tokenizer = _bpe(pre_tokenizers.Sequence(parts) if len(parts) > 1 else parts[0])
    notes = export(_program("mxint4@32/mse"), tmp_path / "out", "gguf", tokenizer=tokenizer).notes
    held = GGUFReader(tmp_path / "out/model.gguf").fields["tokenizer.ggml.pre"].contents()
    assert held == (name or "default")
    assert any("'default', so compare" in note for note in notes) == (name is None)


def test_a_tokenizer_of_another_kind_is_not_written_as_one_over_bytes(tmp_path: Path) -> None:
    """SentencePiece's is a BPE too."""
    with pytest.raises(ExportError, match="only BPE over bytes is written"):
        export(_program("mxint4@32/mse"), tmp_path / "out", "gguf", tokenizer=_bpe(pre_tokenizers.Metaspace()))
    assert list(tmp_path.iterdir()) == []


#: What a program that a run saves has gone through behind the user's passes.
_SAVED = "".join(f'[[pass]]\nname = "{name}"\n' for name in ("quantize-kv-cache", "insert-kv-cache", "pack-weights"))


@pytest.mark.parametrize(("more", "after"), [("", ""), (_CACHE, _SAVED)], ids=["compiled", "saved, with a cache"])
def test_baking_moves_transforms_into_the_weights_of_a_plain_model(more: str, after: str, tmp_path: Path) -> None:
    program = _program("mxint4@32/mse", before=_KEYS + _HADAMARD, more=more, after=after)
    with pytest.raises(ExportError, match=r"a transform at run time.*--bake"):
        export(program, tmp_path / "plain", "hf")
    assert not (tmp_path / "plain").exists()
    written = export(program, tmp_path / "baked", "hf", bake=True)
    assert written.checks["relative error of float32 logits"] <= 1e-5
    config = json.loads((tmp_path / "baked/config.json").read_text())
    assert "baked" in config["mxfx_note"]
    assert not any("no transform" in note for note in written.notes)
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(tmp_path / "baked", dtype=torch.float32)(ids).logits
    told = plain(program).simulated(ids)
    assert (logits - told).norm() < 0.01 * told.norm()


@pytest.mark.parametrize(
    ("to", "options", "reason"),
    [
        ("compressed-tensors", {"weight": "mxfp6_e3m2@32"}, "in mxfp6_e3m2@32: it knows"),
        ("compressed-tensors", {"weight": "mxfp4_e2m1@16"}, "in mxfp4_e2m1@16: it knows"),
        ("compressed-tensors", {"weight": "mxfp4_e2m1@32", "more": 'input = "mxint8@32"'}, "inputs in mxint8@32"),
        ("compressed-tensors", {"weight": "nvfp4", "more": 'input = "nvfp4"'}, "inputs in nvfp4: its readers"),
        (
            "compressed-tensors",
            {"weight": "mxint4@128"},
            "q_proj.weight in mxint4@128 has rows of 64: its readers take",
        ),
        ("gguf", {"weight": "nvfp4"}, "in nvfp4 has rows of 64: it knows"),
        ("gguf", {"weight": "mxint4@16"}, "in mxint4@16 has rows of 64: it knows"),
        ("gguf", {"weight": "mxint4@32", "more": 'input = "mxint4@32"'}, "a GGUF reader rounds activations"),
        ("gguf", {"weight": "mxint4@32", "family": "gemma3-tiny"}, "could not be proved"),
        ("gguf", {"weight": "mxint4@32", "family": "mistral-tiny"}, "GGUF has no architecture of the name 'mistral'"),
        ("gguf", {"weight": "mxint4@32", "family": "qwen3-tiny"}, "transformers does not open what was written: "),
        (
            "hf",
            {"weight": "mxint4@32", "more": _CACHE, "after": "[[pass]]\nname = 'quantize-kv-cache'\n"},
            "attention's k in mxint4@32",
        ),
        ("compressed-tensors", {"weight": "mxint4@32", "before": _HADAMARD}, "a transform at run time"),
    ],
)
def test_what_a_target_cannot_express_is_refused_with_the_reason(
    to: str, options: dict[str, str], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=reason):
        export(_program(**options), tmp_path / "out", to)
    assert list(tmp_path.iterdir()) == []


def test_gains_to_which_a_gguf_reader_adds_are_held_in_float32(tmp_path: Path) -> None:
    """The norms of Nemotron: in bfloat16 most of the sums would be others."""
    text = _ROUNDED.format(weight="mxint4@32", more="").replace('[[pass]]\nname = "fuse-norm"\n', "")
    program = PassManager().run(trace(_in_bfloat16(build("nemotron"))), loads(text).completed()).program
    assert export(program, tmp_path / "out", "gguf").checks["relative error of float32 logits"] <= 1e-5


def test_a_window_that_a_gguf_reader_does_not_read_is_refused(tmp_path: Path) -> None:
    """It is longer than the text of the proof."""
    model = _in_bfloat16(tiny("qwen2-tiny", use_sliding_window=True, sliding_window=64, max_window_layers=0))
    text = _ROUNDED.format(weight="mxint4@32", more="")
    program = PassManager().run(trace(model), loads(text).completed()).program
    with pytest.raises(ExportError, match="sliding_window is 64, which a reader of the file takes for None"):
        export(program, tmp_path / "out", "gguf")
    assert list(tmp_path.iterdir()) == []


def test_baking_says_that_nothing_is_rounded_at_run_time(tmp_path: Path) -> None:
    program = _program(weight="mxint4@32", more=_CACHE, after="[[pass]]\nname = 'quantize-kv-cache'\n")
    notes = export(program, tmp_path / "out", "hf", bake=True).notes
    assert any("activations and cache are in full precision" in note for note in notes), notes
    alone = export(_program(weight="mxint4@32"), tmp_path / "alone", "hf", bake=True).notes
    assert not any("full precision" in note for note in alone)
    assert "no transform runs at run time: --bake changed no weight" in alone
    assert "mxfx_note" not in json.loads((tmp_path / "alone/config.json").read_text())


def test_a_file_that_reads_back_otherwise_is_no_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that loses a bit is caught by its own proof, and nothing stays."""
    from mxfx.export import compressed_tensors

    honest = compressed_tensors._packed

    def lossy(path: str, *rest: object) -> dict[str, torch.Tensor]:
        found = honest(path, *rest)  # type: ignore[arg-type]
        if path == _PROJ:
            found[f"{path}.weight_packed"][3, 1] ^= 1
        return found

    monkeypatch.setattr(compressed_tensors, "_packed", lossy)
    with pytest.raises(ExportError, match=rf"{_PROJ}.weight reads back with 1 of 6144 elements changed"):
        export(_program("mxfp4_e2m1@32"), tmp_path / "out", "compressed-tensors")
    assert list(tmp_path.iterdir()) == []


def test_model_explorer_takes_the_graph_with_overlays(tmp_path: Path) -> None:
    program = _program("mxint4@32", more='input = "mxint8@32"', after=_QUANTIZED)
    written = export(program, tmp_path / "out", "model-explorer")
    assert written.checks == {"nodes": len(program.graph.nodes), "edges": written.checks["edges"], "overlays": 5}

    def overlay(name: str) -> dict:
        return json.loads((tmp_path / f"out/overlay_{name}.json").read_text())["program"]["results"]

    assert {node["value"] for node in overlay("bits").values()} == {4.25}
    assert 0 < overlay("relative_error")["fake_quantize_default"]["value"] < 0.02
    quantizers = [node.name for node in program.graph.nodes if node.name.startswith("fake_quantize")]
    assert set(overlay("KL")) == set(quantizers) and all(0 < node["value"] < 1 for node in overlay("KL").values())
    (color,) = {node["bgColor"] for node in overlay("format").values()}
    assert f"{color}: mxint4@32, mxint8@32" in written.notes
    assert set(overlay("ms")) >= set(quantizers)
    (graph,) = json.loads((tmp_path / "out/graph.json").read_text())["graphs"]
    assert any(node["namespace"] == "model/layers/0/mlp/down_proj" for node in graph["nodes"])


def test_unknown_targets_and_full_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").write_text("")
    with pytest.raises(ExportError, match=r"no export target 'ggfu'; did you mean 'gguf'\?"):
        export(_program("mxint4@32"), tmp_path / "out", "ggfu")
    with pytest.raises(ExportError, match="is not empty; give a new folder"):
        export(_program("mxint4@32"), tmp_path / "full", "hf")
    with pytest.raises(ExportError, match=r"^\. is no name that a new folder could have; give a new folder"):
        export(_program("mxint4@32"), ".", "hf")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "_installed", lambda package: package != "gguf")
    with pytest.raises(ExportError, match=r"needs the package gguf: pip install 'mxfx\[export\]'"):
        export(_program("mxint4@32"), tmp_path / "out", "gguf")


def test_every_target_says_what_it_is() -> None:
    assert set(targets()) == {"hf", "compressed-tensors", "gguf", "model-explorer"}
    assert all(t.meaning for t in targets().values())
    assert Written(Path("x"), "hf", {}).notes == ()
