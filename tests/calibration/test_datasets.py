"""Calibration data: local files of every kind, seeded windows, BOS, and errors that say what to do."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from mxfx.calibration.datasets import SEPARATOR, DatasetError, documents, load_tokens, token_hash

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def byte_tokenizer(*, adds_bos: bool) -> PreTrainedTokenizerFast:
    """One token a byte; `<s>` is BOS, put before a text only if `adds_bos`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(["<s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


@pytest.fixture
def plain() -> PreTrainedTokenizerFast:
    return byte_tokenizer(adds_bos=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files of 100 distinct-by-position bytes each; their names sort against the order of writing."""
    articles = tmp_path / "articles"
    articles.mkdir()
    (articles / "002_b.txt").write_text("".join(LETTERS[i % 26] for i in range(100)).upper())
    (articles / "001_a.txt").write_text("".join(LETTERS[i % 26] for i in range(100)))
    return articles


def test_a_folder_gives_its_txt_files_sorted_by_name(folder: Path) -> None:
    (folder / "notes.md").write_text("not an article")
    first, second = documents(folder)
    assert first.islower() and second.isupper()


def test_jsonl_parquet_and_txt_give_the_same_documents(tmp_path: Path) -> None:
    texts = ["one\nline", "zwölf 零"]
    jsonl = tmp_path / "a.jsonl"
    jsonl.write_text("\n".join(json.dumps({"text": text, "id": 1}, ensure_ascii=False) for text in texts) + "\n")
    parquet = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2], "text": texts}), parquet)
    txt = tmp_path / "a.txt"
    txt.write_text(texts[0])
    assert documents(jsonl) == texts
    assert documents(parquet) == texts
    assert documents(txt) == texts[:1]


def test_windows_are_parts_of_the_joined_documents_and_do_not_overlap(
    folder: Path, plain: PreTrainedTokenizerFast
) -> None:
    joined = SEPARATOR.join(documents(folder))
    tokens = load_tokens(folder, plain, samples=20, length=10, seed=3)
    assert tokens.ids.shape == (20, 10) and tokens.ids.dtype == torch.int64
    texts = [plain.decode(row) for row in tokens.ids]
    assert all(text in joined for text in texts)
    # 20 × 10 of 202 tokens: only windows without overlap hold that many distinct positions.
    stream = torch.tensor(plain(joined)["input_ids"])
    starts = [{at for at in range(193) if torch.equal(stream[at : at + 10], row)} for row in tokens.ids]
    phases = set.intersection(*({at % 10 for at in candidates} for candidates in starts))
    assert phases, "every window starts on one grid"
    assert len({text for text in texts}) > 10


def test_the_seed_decides_the_windows_and_the_hash_follows_them(folder: Path, plain: PreTrainedTokenizerFast) -> None:
    def load(seed: int):
        return load_tokens(folder, plain, samples=4, length=16, seed=seed)

    assert torch.equal(load(0).ids, load(0).ids)
    assert load(0).sha == load(0).sha == token_hash(load(0).ids)
    assert not torch.equal(load(0).ids, load(1).ids)
    assert load(0).sha != load(1).sha


def test_the_hash_sees_the_shape() -> None:
    ids = torch.arange(6)
    assert token_hash(ids.view(2, 3)) != token_hash(ids.view(3, 2))


def test_samples_begin_with_bos_where_the_tokenizer_puts_it(folder: Path) -> None:
    with_bos = load_tokens(folder, byte_tokenizer(adds_bos=True), samples=5, length=8, seed=0)
    assert with_bos.ids.shape == (5, 8)
    assert (with_bos.ids[:, 0] == 0).all() and (with_bos.ids[:, 1:] != 0).all()


def test_a_bos_that_the_tokenizer_does_not_put_is_not_put(folder: Path) -> None:
    without = load_tokens(folder, byte_tokenizer(adds_bos=False), samples=5, length=8, seed=0)
    assert (without.ids != 0).all()


def test_too_few_tokens_says_how_many_there_are(folder: Path, plain: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DatasetError, match=r"has 202 tokens, but samples × length = 21 × 10 needs 210"):
        load_tokens(folder, plain, samples=21, length=10, seed=0)


def _places(folder: Path, tokenizer: PreTrainedTokenizerFast, ids: torch.Tensor) -> list[int]:
    """Where each window stands in the stream; texts of distinct letters make that one place."""
    stream = torch.tensor(tokenizer(SEPARATOR.join(documents(folder)))["input_ids"])
    width = ids.shape[1]
    (found,) = zip(
        *[[at for at in range(len(stream) - width + 1) if torch.equal(stream[at : at + width], row)] for row in ids],
        strict=True,
    )
    return list(found)


def test_a_text_that_is_too_short_is_read_again_at_other_offsets(
    tmp_path: Path, plain: PreTrainedTokenizerFast
) -> None:
    text = tmp_path / "a.txt"
    text.write_text("".join(chr(33 + i) for i in range(90)))
    found = load_tokens(text, plain, samples=32, length=10, seed=3, repeat=True)
    assert found.ids.shape == (32, 10)
    places = _places(text, plain, found.ids)
    # Nine windows at the first reading, eight at each other.
    rounds = [places[:9], places[9:17], places[17:25], places[25:]]
    offsets = []
    for of_round in rounds:
        assert len(set(of_round)) == len(of_round)
        (offset,) = {place % 10 for place in of_round}
        offsets.append(offset)
    assert len(set(offsets)) == 4
    assert sorted(places[:9]) == list(range(0, 90, 10))
    assert found.notes == (f"{text}: 32 samples of 90 tokens, each token seen 3.6 times, at other offsets",)
    again = load_tokens(text, plain, samples=32, length=10, seed=3, repeat=True)
    assert torch.equal(again.ids, found.ids)
    assert not torch.equal(load_tokens(text, plain, samples=32, length=10, seed=4, repeat=True).ids, found.ids)


def test_a_text_that_is_long_enough_is_read_once_with_repeat_too(folder: Path, plain: PreTrainedTokenizerFast) -> None:
    once = load_tokens(folder, plain, samples=20, length=10, seed=0)
    asked = load_tokens(folder, plain, samples=20, length=10, seed=0, repeat=True)
    assert torch.equal(once.ids, asked.ids) and asked.notes == ()
    more = load_tokens(folder, plain, samples=25, length=10, seed=0, repeat=True)
    assert torch.equal(more.ids[:20], once.ids)


@pytest.mark.parametrize("tokens", [10, 11, 19, 20])
def test_one_window_can_be_repeated(tmp_path: Path, plain: PreTrainedTokenizerFast, tokens: int) -> None:
    (tmp_path / "a.txt").write_text("".join(chr(33 + i) for i in range(tokens)))
    found = load_tokens(tmp_path / "a.txt", plain, samples=7, length=10, seed=0, repeat=True)
    assert len(_places(tmp_path / "a.txt", plain, found.ids)) == 7


def test_a_text_shorter_than_a_window_is_refused_with_repeat_too(
    tmp_path: Path, plain: PreTrainedTokenizerFast
) -> None:
    (tmp_path / "a.txt").write_text("123456789")
    with pytest.raises(DatasetError, match=r"give more text$"):
        load_tokens(tmp_path / "a.txt", plain, samples=1, length=10, seed=0, repeat=True)


def test_the_refusal_of_a_short_text_names_the_option(folder: Path, plain: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DatasetError, match=r"give more text or set calibration\.repeat = true"):
        load_tokens(folder, plain, samples=21, length=10, seed=0)


@pytest.mark.parametrize(("samples", "length"), [(0, 8), (1, 0)])
def test_no_samples_or_no_length_is_refused(
    folder: Path, plain: PreTrainedTokenizerFast, samples: int, length: int
) -> None:
    with pytest.raises(DatasetError, match=f"samples={samples}, length={length}"):
        load_tokens(folder, plain, samples=samples, length=length, seed=0)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("wikitext", "wikitext2"), ("wiki-text2", "wikitext2"), ("C4", "c4"), ("pbt", "ptb")],
)
def test_an_unknown_name_is_answered_with_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(DatasetError, match=f"unknown data set '{name}', nearest is '{nearest}'"):
        documents(name)


def test_a_path_that_is_not_there_is_called_a_path(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no such file or folder"):
        documents(tmp_path / "articles")


def test_a_folder_without_txt_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"holds no \.txt file; expected .* a folder of \.txt files$"):
        documents(tmp_path)
    (tmp_path / "news.jsonl").write_text("{}")
    with pytest.raises(DatasetError, match=r"; did you mean '.*/news\.jsonl'\?$"):
        documents(tmp_path)


def test_an_unknown_suffix_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\nhello")
    with pytest.raises(DatasetError, match=r"cannot read \.csv; expected a \.txt, \.jsonl or \.parquet"):
        documents(tmp_path / "a.csv")


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{oops", r"a\.jsonl:2: is not JSON \(.* column 2 "),
        ('{"body": "x"}', r"a\.jsonl:2: expected an object with a string \"text\", found 'body'"),
        ('["x"]', r"a\.jsonl:2: .* found list"),
    ],
)
def test_a_malformed_jsonl_line_is_named(tmp_path: Path, line: str, complaint: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line)
    with pytest.raises(DatasetError, match=complaint):
        documents(tmp_path / "a.jsonl")


def test_a_parquet_file_without_text_says_what_it_has(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(DatasetError, match='expected a column "text", found body'):
        documents(tmp_path / "a.parquet")


def test_a_parquet_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(DatasetError, match="is not a parquet file"):
        documents(tmp_path / "a.parquet")


def test_a_text_file_in_another_encoding_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("zwölf".encode("latin-1"))
    with pytest.raises(DatasetError, match=r"is not UTF-8 \(byte 2\)"):
        documents(tmp_path / "a.txt")


def test_blank_files_are_no_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(DatasetError, match="holds no text"):
        documents(tmp_path / "a.txt")


def test_hub_names_ask_the_hub_for_the_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def load_dataset(**arguments):
        asked.update(arguments)
        return [{"text": "a"}, {"text": ""}, {"text": "b"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert documents("wikitext2", split="test") == ["a", "b"]
    assert asked == {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "test"}


def test_an_unreachable_hub_says_to_give_a_local_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(**_):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DatasetError, match=r"(?s)'wikitext2'.*no route to host.*give a local data set"):
        documents("wikitext2")


@pytest.mark.real_model
def test_calibration_and_evaluation_articles_never_overlap(
    calibration_articles: Path, evaluation_articles: Path
) -> None:
    calibration = {file.name for file in calibration_articles.glob("*.txt")}
    evaluation = {file.name for file in evaluation_articles.glob("*.txt")}
    assert (len(calibration), len(evaluation)) == (68, 23)
    assert not calibration & evaluation
    indices = sorted(int(name[:3]) for name in calibration | evaluation)
    assert indices == list(range(91))


@pytest.mark.real_model
def test_articles_hold_no_markup(calibration_articles: Path, evaluation_articles: Path) -> None:
    texts = [*documents(calibration_articles), *documents(evaluation_articles)]
    assert not [mark for mark in ("{{", "[[", "<ref", "|thumb", "{|") if any(mark in text for text in texts)]
    assert min(map(len, texts)) > 3_000


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, suffix: str) -> None:
    text = "first word" if suffix == ".txt" else json.dumps({"text": "first word"})
    path = tmp_path / f"marked{suffix}"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert documents(path) == ["first word"]
