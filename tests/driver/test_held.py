"""A model larger than memory is refused only where it would be held: what safetensors hold as it is used is mapped."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mxfx.config import loads
from mxfx.driver import job as jobs
from mxfx.driver import pretrained
from mxfx.driver.job import Job
from mxfx.driver.pretrained import ModelError, check_fits, load_meta_model
from mxfx.graph.tiny import tiny
from tests.local_model import save_model

_FUSED = "[[pass]]\nname = 'fuse-norm'\n"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with 4 KB of memory."""
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1}.__getitem__)


def _check(folder: Path, dtype: str = "float32") -> None:
    check_fits(folder, load_meta_model(folder, dtype).parameters())


@pytest.mark.parametrize("shard", ["1GB", "40KB"])
def test_what_lies_in_files_as_it_is_used_is_not_held(tmp_path: Path, small: None, shard: str) -> None:
    tiny("llama-tiny").save_pretrained(tmp_path, max_shard_size=shard)
    assert len(list(tmp_path.glob("*.safetensors"))) == (1 if shard == "1GB" else 11)
    _check(tmp_path)
    with pytest.raises(ModelError, match="do not hold in the precision asked for"):
        _check(tmp_path, "bfloat16")


def test_what_the_checkpoint_lacks_is_held(tmp_path: Path, small: None) -> None:
    file = save_model(tmp_path) / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ModelError, match="do not hold"):
        _check(tmp_path)


def test_a_model_that_has_to_be_fetched_is_taken_for_what_its_configuration_says(
    monkeypatch: pytest.MonkeyPatch, small: None
) -> None:
    asked = []

    def stated(*given: object) -> torch.dtype:
        asked.append(given)
        return torch.bfloat16

    monkeypatch.setattr(pretrained, "_stated_dtype", stated)
    check_fits("nobody/nothing", [torch.empty(1 << 40, device="meta", dtype=torch.bfloat16)])
    with pytest.raises(ModelError, match="4,398 GB of which"):
        check_fits("nobody/nothing", [torch.empty(1 << 40, device="meta")], revision="r", trust_remote_code=True)
    # Once each, not for each weight; as whoever fetches it may.
    assert asked == [("nobody/nothing", None, False), ("nobody/nothing", "r", True)]


def test_without_a_folder_for_the_run_rewritten_weights_lie_in_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "host_bytes", lambda: 1)
    monkeypatch.setenv("MXFX_CACHE", str(tmp_path))
    pipeline = loads(_FUSED).completed()
    job = Job.of_model(tiny("llama-tiny"), torch.device("cpu"))
    job.run(pipeline)
    assert [file.name for file in tmp_path.iterdir()] == ["weights"] and not list((tmp_path / "weights").iterdir())
    monkeypatch.setenv("MXFX_CACHE", str(tmp_path / "home"))
    (tmp_path / "home").touch()
    (tmp_path / "file").touch()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        job.run(pipeline)
    assert any("weights that passes rewrite are held in memory; set MXFX_CACHE" in str(w.message) for w in told)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        job.run(pipeline, cache=tmp_path / "file" / "cache")
        job.run(pipeline, cache=tmp_path / "file" / "cache")
    # MXFX_CACHE has no part in it; nor is it news the second time.
    (said,) = (str(w.message) for w in told if "cannot be written to" in str(w.message))
    assert said.startswith(f"{tmp_path / 'file' / 'cache' / 'weights'} ") and "held in memory" in said
    assert "MXFX_CACHE" not in said
