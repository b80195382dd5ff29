"""Adam spread over two ranks: the parameters of one process, half of the moments each, one checkpoint of the whole."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mxfx.ground import ranks
from tests.calibration.tuned_by_ranks import tuned


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "-m", "tests.calibration.tuned_by_ranks", str(out)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.mark.parametrize(("file", "accumulate"), [("found", 1), ("split", 2)])
def test_two_ranks_tune_as_one(two: Path, file: str, accumulate: int) -> None:
    one, _ = tuned(accumulate=accumulate)
    for name, found in load_file(two / f"{file}.safetensors").items():
        assert torch.allclose(found, one[name], rtol=1e-4, atol=1e-5), name
        assert found.shape == one[name].shape


def test_each_rank_holds_the_moments_of_its_part(two: Path) -> None:
    total = 7 + 15 + 143 + 1
    held = load_file(two / "held.safetensors")["held"].tolist()
    assert sum(held) == total and max(held) < 0.6 * total


def test_a_rank_without_an_element_of_its_own_tunes_with_the_others(two: Path) -> None:
    one, _ = tuned(only="d")
    found = load_file(two / "one.safetensors")
    assert torch.allclose(found["d"], one["d"], rtol=1e-5)
    assert abs(float(found["d"] - tuned(steps=0, only="d")[0]["d"])) > 1e-3


def test_a_run_that_goes_on_ends_with_the_same_bits(two: Path) -> None:
    whole, resumed = (load_file(two / f"{name}.safetensors") for name in ("found", "resumed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_scattered_is_a_part_of_the_sum_alone() -> None:
    x = torch.arange(5.0)
    assert ranks.scattered(x) is x
