"""What ``mxfx check`` says of the memory of a calibration is what the pass then expects."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import nn

from mxfx.config.pipeline import loads
from mxfx.driver.check import check
from mxfx.graph.program import Program
from mxfx.graph.tiny import tiny
from mxfx.report.memory import multiplying
from tests.local_model import save_model
from tests.mixtures import mixture, raised_mixture

_PIPELINE = r"""
[model]
name = "MODEL"
dtype = "float32"

[calibration]
samples = 64
length = 128

[[pass]]
name = "annotate"
partial = true
  [[pass.rule]]
  match  = 'model\.layers\.\d+\..*proj'
  weight = "mxint4@32"

[[pass]]
name = "gptq"
samples = SAMPLES
"""


def _line(folder: Path, samples: int) -> list[float]:
    text = _PIPELINE.replace("MODEL", str(folder)).replace("SAMPLES", str(samples))
    (line,) = (line for line in check(loads(text)).lines() if "gptq holds" in line)
    return [float(word) for word in line.split("gptq holds")[1].split() if word.replace(".", "").isdigit()]


def test_more_samples_wait_and_the_device_holds_no_more(tmp_path: Path, monkeypatch) -> None:
    save_model(tmp_path)
    monkeypatch.setattr("mxfx.driver.check._GB", 1.0)
    few, waiting, with_them = _line(tmp_path, 16)
    more, twice, with_more = _line(tmp_path, 32)
    # Beside what waits of all samples, what one batch gives comes before what it was made of goes.
    assert few == more and 1.6 * waiting < twice < 2 * waiting and with_more > with_them > few > 0


def test_a_pass_back_through_the_whole_model_is_told(tmp_path: Path) -> None:
    save_model(tmp_path)
    text = _PIPELINE.replace("MODEL", str(tmp_path)).replace("SAMPLES", "16")
    told = [
        "gradients of the loss hold" in "\n".join(check(loads(text + more)).lines()) for more in ("", "guided = true\n")
    ]
    assert told == [False, True]


def test_second_moments_of_inputs_are_told(tmp_path: Path, monkeypatch) -> None:
    save_model(tmp_path)
    monkeypatch.setattr("mxfx.driver.check._GB", 1.0)
    transform = '[[pass]]\nname = "transform-inputs"\nkind = "KIND"\nblock = 16\n\n[[pass]]\nname = "gptq"'
    text = (
        _PIPELINE.replace("MODEL", str(tmp_path))
        .replace("SAMPLES", "16")
        .replace('weight = "mxint4@32"\n', 'weight = "mxint4@32"\n  input = "mxint4@32"\n')
    )
    lines = {
        kind: [
            line
            for line in check(loads(text.replace('[[pass]]\nname = "gptq"', transform.replace("KIND", kind)))).lines()
            if "second moments" in line
        ]
        for kind in ("wush", "hadamard")
    }
    assert lines["hadamard"] == []
    (line,) = lines["wush"]
    config = json.loads((tmp_path / "config.json").read_text())
    hidden, wide, layers = (config[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    # q/k/v, o, gate/up and down: four inputs a layer, float32, 16 columns for each.
    assert f"sums {4 * 16 * layers * (3 * hidden + wide):.2f} GB" in line


def test_a_distillation_by_layer_is_told_to_hold_one_layer(tmp_path: Path) -> None:
    save_model(tmp_path)
    distill = '[[pass]]\nname = "insert-fake-quant"\n\n[[pass]]\nname = "distill"\nscope = "SCOPE"'
    text = _PIPELINE.partition('[[pass]]\nname = "gptq"')[0].replace("MODEL", str(tmp_path)) + distill

    def said(scope: str) -> list[float]:
        (line,) = (line for line in check(loads(text.replace("SCOPE", scope))).lines() if "distill holds" in line)
        words = line.split("distill holds")[1].split()
        return [float(word) for word in words if word.replace(".", "").isdigit()]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mxfx.driver.check._GB", 1.0)
        whole, one = said("model")
        assert said("layer") == [one]
    program = check(loads(text.replace("SCOPE", "model"))).annotated
    assert one == _layer_bytes(program) and whole > 2 * one


def _layer_bytes(program: Program) -> int:
    """Of a layer of a float32 Llama: two copies of its weights, 16 bytes for each of those in linears."""
    of = {name: tensor.numel() for name, tensor in program.weights.items() if name.startswith("model.layers.0.")}
    return 8 * sum(of.values()) + 16 * sum(count for name, count in of.items() if "_proj" in name)


def test_work_is_that_of_the_passes_that_read_calibration_data(tmp_path: Path) -> None:
    """Rounding to nearest reads none; distill reads its batches again and again, not the data set once."""
    save_model(tmp_path)
    layers = [layer for layer in tiny("llama-tiny").modules() if isinstance(layer, nn.Linear)]
    a_token = 2 * sum(layer.weight.numel() for layer in layers)
    text = _PIPELINE.replace("MODEL", str(tmp_path)).replace("SAMPLES", "16")
    head = text.partition('[[pass]]\nname = "gptq"')[0]
    tuned = head + '[[pass]]\nname = "insert-fake-quant"\n[[pass]]\nname = "distill"\nsteps = 100\nbatch_size = 8\n'
    assert list(check(loads(text))._work()) == [("gptq", 16 * 128, 2 * 16 * 128 * a_token)]
    assert list(check(loads(tuned))._work()) == [("distill", 100 * 8 * 128, 4 * 100 * 8 * 128 * a_token)]
    nearest = head + '[[pass]]\nname = "round-weights"\n'
    assert not any(line.startswith("work") for line in check(loads(nearest)).lines())


def test_a_token_s_work_is_that_of_its_own_experts() -> None:
    """Two of four: a mixture holds more weights than it multiplies by."""
    model, program = mixture("mixtral"), raised_mixture("mixtral")
    dense = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Linear))
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    router = sum(p.numel() for name, p in model.named_parameters() if name.endswith("gate.weight"))
    assert experts > 0 and multiplying(program, 10) == 10 * 2 * (dense + router + experts // 2)
