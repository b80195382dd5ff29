"""Weights that lie in mapped files are the same weights, and the process does not hold them."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mxfx.formats import parse
from mxfx.graph.filed import Files
from mxfx.graph.weights import WeightStore, hash_beside, tensor_hash

_SHAPE = (512, 1024)


def _random() -> Tensor:
    return torch.randn(_SHAPE, generator=torch.Generator().manual_seed(0))


def _anonymous() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def test_a_change_is_read_back_to_the_bit_and_its_file_has_no_name(tmp_path: Path) -> None:
    store = WeightStore({"w": torch.zeros(_SHAPE)})
    store.keep_in_files(tmp_path / "weights")
    store.set("w", _random(), "a")
    assert torch.equal(store["w"], _random()) and torch.equal(store.copy()["w"], _random())
    assert store.hash("w") == store.ledger[-1].after == tensor_hash(_random())
    assert os.listdir(tmp_path / "weights") == []


def test_what_bfloat16_holds_is_kept_in_it(tmp_path: Path) -> None:
    store = WeightStore({"w": torch.zeros(_SHAPE)})
    store.keep_in_files(tmp_path)
    rounded = parse("mxint4@32").fake_quantize(_random())
    store.set("w", rounded, "a")
    assert store["w"].dtype == torch.bfloat16 and store.master("w").dtype == torch.float32
    assert torch.equal(store.master("w"), rounded)


def test_a_tensor_to_be_filled_is_one_like_any_other(tmp_path: Path) -> None:
    home = Files(tmp_path).empty(torch.Size(_SHAPE), torch.float32)
    assert torch.equal(home, torch.zeros(_SHAPE))
    assert hash_beside(_random(), home).result() == tensor_hash(home)
    assert torch.equal(home, _random())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux what the process holds")
def test_the_process_holds_no_more_than_a_few_of_them(tmp_path: Path) -> None:
    names = [f"w{i}" for i in range(8)]
    store = WeightStore({name: torch.zeros(1) for name in names})
    store.keep_in_files(tmp_path)
    gc.collect()
    start = _anonymous()
    for index, name in enumerate(names):
        store.set(name, torch.full((3072, 3072), 1 / 3 + index), "a")
    wide = store.cast(torch.float64)
    # Larger than what malloc keeps for itself.
    assert _anonymous() - start < 64 << 20, "8 weights of 38 MB, and their copies of 75 MB"
    assert wide["w0"].dtype == torch.float64 and float(wide["w7"][5, 5]) == float(store["w7"][5, 5])
    assert all(float(store[name][5, 5]) == pytest.approx(1 / 3 + i) for i, name in enumerate(names))
