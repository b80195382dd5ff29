"""GPTQ by four processes: the weights of one, whatever each of them measured and solved."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file

from tests.calibration.quantized_by_ranks import quantized


def test_four_ranks_round_as_one(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    done = subprocess.run(
        [*command, "-m", "tests.calibration.quantized_by_ranks", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, four = quantized(), load_file(tmp_path / "found.safetensors")
    assert one.keys() == four.keys()
    same = sum(int((one[name] == four[name]).sum()) for name in one)
    assert same >= 0.999 * sum(tensor.numel() for tensor in one.values())
