"""What ``mxfx check`` says of the memory of a calibration is what the pass then expects."""

from __future__ import annotations

from pathlib import Path

from mxfx.config.pipeline import loads
from mxfx.driver.check import check
from tests.local_model import save_model

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
    assert few == more and twice == 2 * waiting and with_more > with_them > few > 0
