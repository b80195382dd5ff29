"""A file of weights that is written piece by piece is a safetensors file as the library reads it."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from mxfx.export.artefact import _DTYPES, safetensors_pieces
from mxfx.ground.files import write_file


def test_the_library_reads_every_dtype_back_to_the_bit(tmp_path: Path) -> None:
    tensors = {
        f"{name} ü.{i}": (torch.arange(12).view(3, 4) % 7 + i).to(dtype)
        for i, (dtype, name) in enumerate(_DTYPES.items())
    }
    tensors |= {"empty": torch.empty(0, 4), "scalar": torch.tensor(3.5), "turned": torch.arange(6.0).view(2, 3).mT}
    write_file(tmp_path / "w.safetensors", safetensors_pieces(tensors))
    found = load_file(tmp_path / "w.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].float(), tensor.float())
