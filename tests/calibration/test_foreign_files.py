"""Files that other tools left where ours go: read if they are data, else left alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mxfx.calibration.datasets import DatasetError, load_tokens
from mxfx.calibration.decisions import load_decisions, store_decisions


def collected(path: Path, *lengths: int) -> Path:
    rows = [torch.arange(n)[None] + 10 * i for i, n in enumerate(lengths)]
    torch.save({"loader": [(ids, torch.full_like(ids, -100)) for ids in rows]}, path)
    return path


def test_collected_tokens_are_taken_as_they_are(tmp_path: Path) -> None:
    found = load_tokens(collected(tmp_path / "c.pt", 9, 4, 8), None, samples=2, length=8, seed=0)
    assert torch.equal(found.ids, torch.stack([torch.arange(8), torch.arange(8) + 20]))


def test_too_few_collected_tokens_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="1 of 2 samples have 8 tokens or more, and 2 are asked for"):
        load_tokens(collected(tmp_path / "c.pt", 9, 4), None, samples=2, length=8, seed=0)


class Stranger:
    """What a file of tokens has no use for."""


@pytest.mark.parametrize("content", [{"tokens": []}, {"loader": [Stranger()]}, {"loader": [(torch.ones(1, 9), 0)]}])
def test_nothing_but_token_ids_is_read(tmp_path: Path, content: dict) -> None:
    torch.save(content, tmp_path / "c.pt")
    with pytest.raises(DatasetError, match=r"c\.pt"):
        load_tokens(tmp_path / "c.pt", None, samples=1, length=8, seed=0)


@pytest.mark.parametrize("text", ['{"winners": ["q_proj"]}', "[1]", "no json"])
def test_decisions_of_another_tool_are_never_overwritten(tmp_path: Path, text: str) -> None:
    file = tmp_path / "rotation_decisions.json"
    file.write_text(text)
    found, why = load_decisions(file, "k")
    assert found is None and why is not None and "the file stays as it is" in why
    store_decisions(file, "k", {"winners": []})
    assert file.read_text() == text


def test_decisions_of_our_own_under_another_key_are_replaced(tmp_path: Path) -> None:
    file = tmp_path / "d.json"
    store_decisions(file, "old", {"winners": ["q_proj"]})
    store_decisions(file, "new", {"winners": []})
    assert json.loads(file.read_text()) == {"key": "new", "winners": []}
