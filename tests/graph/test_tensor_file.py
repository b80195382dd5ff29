"""A file of tensors comes back as it was written, or is called damaged: no flipped bit becomes a number."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from mxfx.graph.tensor_file import read_tensors, tensors_hash, write_tensors
from mxfx.ground.files import DamagedFile
from tests.damage import damaged

TENSORS = {
    "a": torch.arange(6.0).view(2, 3).T,
    "b/c": torch.tensor([1, -2], dtype=torch.int32),
    "half": torch.full((3,), torch.nan, dtype=torch.bfloat16),
}


def test_tensors_and_what_is_said_of_them_come_back(tmp_path: Path) -> None:
    write_tensors(tmp_path / "new/t.safetensors", TENSORS, {"step": 3, "of": [1.5, None]})
    found, about = read_tensors(tmp_path / "new/t.safetensors")
    assert about == {"step": 3, "of": [1.5, None]}
    assert tensors_hash(found) == tensors_hash(TENSORS)
    assert found["a"].tolist() == TENSORS["a"].tolist()


def test_the_hash_sees_names_shapes_and_bits() -> None:
    others = [{"b": TENSORS["a"]}, {"a": TENSORS["a"].T}, {"a": -TENSORS["a"]}, {}]
    assert len({tensors_hash(one) for one in ({"a": TENSORS["a"]}, *others)}) == 5


def test_every_damage_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "t.safetensors"
    write_tensors(file, TENSORS, {"step": 3})
    whole, draw = file.read_bytes(), random.Random(0)
    for _ in range(200):
        file.write_bytes(damaged(whole, draw))
        try:
            found, about = read_tensors(file)
        except DamagedFile as error:
            assert str(file) in str(error)
        else:
            assert (tensors_hash(found), about) == (tensors_hash(TENSORS), {"step": 3})


def test_a_file_of_another_tool_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, tmp_path / "t.safetensors")
    with pytest.raises(DamagedFile, match=r"t\.safetensors: cannot be read \(KeyError: 'about'\)"):
        read_tensors(tmp_path / "t.safetensors")
    with pytest.raises(DamagedFile, match="cannot be read"):
        read_tensors(tmp_path / "missing.safetensors")
