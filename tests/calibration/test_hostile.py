"""Damaged calibration files, made by mutation of real ones: each is read, or gives one error that names the file."""

from __future__ import annotations

import json
import random
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from mxfx.calibration import datasets
from mxfx.calibration.datasets import DatasetError, collected_ids, documents
from tests.damage import damaged

_TEXTS = [f"Sentence {i} of a text: naïve, “quoted”, 東京." for i in range(8)]


def _real(path: Path) -> None:
    if path.suffix == ".txt":
        path.write_text("\n".join(_TEXTS), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps({"text": text}) for text in _TEXTS))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pa.table({"text": _TEXTS}), path)
    else:
        torch.save({"loader": [(torch.arange(9)[None], torch.zeros(1, 9)) for _ in range(2)]}, path)


def _read(path: Path) -> None:
    if path.suffix == ".pt":
        ids = collected_ids(path, 2, 8)
        assert ids.shape == (2, 8) and ids.dtype == torch.int64
    else:
        assert all(isinstance(text, str) and text.encode() for text in documents(path))


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet", ".pt"])
def test_a_mutated_file_is_read_or_gives_one_error(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"data{suffix}"
    _real(path)
    whole = path.read_bytes()
    _read(path)
    draw = random.Random(0)
    refused = 0
    for _ in range(100):
        path.write_bytes(damaged(whole, draw))
        try:
            _read(path)
        except DatasetError as error:
            refused += 1
            assert str(path) in str(error), "the error says where"
    assert refused, "no mutation was noticed: they damage nothing"


@pytest.mark.parametrize(
    "line",
    [
        '{"text": ' + "[" * 100_000,
        '{"text": 1' + "0" * 5_000 + "}",
        '{"text": "a\\ud800"}',
        '{"text": null}',
        "[]",
    ],
    ids=["deep nesting", "a number of 5000 digits", "half a surrogate pair", "no text", "a list"],
)
def test_an_odd_line_is_named(line: str, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"text": "good"}\n' + line)
    with pytest.raises(DatasetError, match=r"data\.jsonl:2"):
        documents(tmp_path / "data.jsonl")


@pytest.mark.parametrize(
    "column", [[1, 2], [b"a", b"b"], [["a"], ["b"]], [{"a": 1}]], ids=["int", "bytes", "list", "struct"]
)
def test_a_column_of_another_type_is_named(column: list, tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pa.table({"text": column}), tmp_path / "data.parquet")
    with pytest.raises(DatasetError, match=r"data\.parquet"):
        documents(tmp_path / "data.parquet")


@pytest.mark.parametrize(
    "content",
    [
        [],
        {"loader": 1},
        {"loader": None},
        {"loader": [()]},
        {"loader": [("a", 0)]},
        {"loader": [(None, 0)] * 2},
        {"loader": [(torch.full((9,), 1j), 0)] * 2},
        {"loader": {}},
    ],
)
def test_other_content_of_a_token_file_is_named(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "c.pt")
    with pytest.raises(DatasetError, match=r"c\.pt"):
        collected_ids(tmp_path / "c.pt", 2, 8)


def test_a_token_file_that_unpacks_to_more_than_it_is_gets_no_memory(tmp_path: Path) -> None:
    repeated, packed = tmp_path / "r.pt", tmp_path / "p.pt"
    torch.save({"loader": [(torch.zeros(1, dtype=torch.int64).expand(1 << 40), 0)]}, repeated)
    with pytest.raises(DatasetError, match=r"r\.pt: its tensors have more elements than it holds bytes for"):
        collected_ids(repeated, 1, 8)
    torch.save({"loader": [(torch.zeros(1, 1 << 20, dtype=torch.int64), 0)]}, repeated)
    with zipfile.ZipFile(repeated) as given, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as made:
        for entry in given.infolist():
            made.writestr(entry.filename, given.read(entry))
    assert packed.stat().st_size < 1 << 16
    with pytest.raises(DatasetError, match=r"p\.pt: has compressed entries"):
        collected_ids(packed, 1, 8)


def test_a_small_file_that_unpacks_to_endless_text_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    column = pa.array(["x" * 100_000] * 2_000).dictionary_encode()
    pyarrow.parquet.write_table(pa.table({"text": column}), tmp_path / "data.parquet", compression="zstd")
    assert (tmp_path / "data.parquet").stat().st_size < 1 << 20
    monkeypatch.setattr(datasets, "_CHARACTERS", 1_000_000)
    with pytest.raises(DatasetError, match=r"data\.parquet: holds more than 1,000,000 characters"):
        documents(tmp_path / "data.parquet")
