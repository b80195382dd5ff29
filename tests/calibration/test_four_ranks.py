"""GPTQ and statistics by four processes: those of one, whatever each of them measured and solved."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.calibration.quantized_by_ranks import measured, quantized


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    out = tmp_path_factory.mktemp("four")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    done = subprocess.run(
        [*command, "-m", "tests.calibration.quantized_by_ranks", str(out)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(out / "found.safetensors")


def test_four_ranks_round_as_one(four: dict[str, Tensor]) -> None:
    one = quantized()
    assert one.keys() <= four.keys()
    same = sum(int((one[name] == four[name]).sum()) for name in one)
    assert same >= 0.999 * sum(tensor.numel() for tensor in one.values())


@pytest.mark.parametrize("samples", [9, 3])
def test_four_ranks_measure_as_one(four: dict[str, Tensor], samples: int) -> None:
    """Of three samples one rank has none."""
    one = measured(samples)
    assert one.keys() == {name for name in four if name.endswith(f" {samples}")}
    for name, expected in one.items():
        # Sums are in float32, in another order; rows and tokens that chance decides are the same.
        torch.testing.assert_close(four[name], expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
