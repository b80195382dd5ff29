"""Texts by name from the Hugging Face hub or from local files, and seeded token samples of them."""

from __future__ import annotations

import hashlib
import itertools
import math
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mxfx.ground.errors import MxfxError
from mxfx.ground.files import DamagedFile, parse_json
from mxfx.ground.hub import reached
from mxfx.ground.nearest import nearest

SEPARATOR = "\n\n"
"""What joins documents before they are cut into windows; GPTQ (arXiv 2210.17323) joins WikiText-2 so too."""

_LOCAL_FORMS = "a .txt, .jsonl or .parquet file, or a folder of .txt files"
_TEXT_KEY = "text"
# Large enough for 128 samples of 4096 tokens, small enough to tokenize in seconds.
_C4_DOCUMENTS = 8_000
#: A data set is read whole; a small file may unpack to more than memory holds.
_CHARACTERS = 4 << 30
_ROWS = 256


class DatasetError(MxfxError, ValueError):
    """A data set is unknown, unreachable, malformed or too small; the message says what to do."""


@dataclass(frozen=True)
class TokenSet:
    """Token ids for calibration.

    Attributes:
        ids: int64 `(samples, length)` on CPU.
        sha: blake2b-256 hex digest of shape and little-endian bytes of `ids`: what caches are keyed by.
        source: the name or path that the user gave.
        notes: what is to be told about how they were drawn.
    """

    ids: torch.Tensor
    sha: str
    source: str
    notes: tuple[str, ...] = ()


def load_tokens(
    source: str | Path,
    tokenizer: Any,
    *,
    samples: int,
    length: int,
    seed: int,
    split: str = "train",
    repeat: bool = False,
) -> TokenSet:
    """`samples` random windows of `length` tokens; the same arguments give the same ids everywhere.

    Documents are tokenized without special tokens and joined by `SEPARATOR`. That stream is cut into windows
    that do not overlap, from a random start, and `samples` of them are drawn: no token is used twice. If the
    tokenizer itself begins a text with BOS (Llama 3 does, SmolLM2 and Qwen do not), so does each sample, and
    `length - 1` tokens of text follow. With `repeat` a text that is too short is read again, as often as it takes, and
    cut at other places each time, which `notes` tell; what is drawn from its first reading stays the same.

    Args:
        source: `wikitext2`, `c4`, `ptb` (from the hub), a local .txt, .jsonl or .parquet file or a folder, or a .pt
            file of token ids (see `collected_ids`), whose first samples are taken as they are.
        split: of a hub data set; local files have none.
        repeat: use tokens of a text more than once where there are too few; not of a .pt file.

    Raises:
        DatasetError: unknown name, hub unreachable, malformed file, or too few tokens.
    """
    if str(source).endswith(".pt"):
        ids = collected_ids(Path(source), samples, length)
        return TokenSet(ids, token_hash(ids), str(source))
    bos = leading_bos(tokenizer)
    body = length - len(bos)
    if samples < 1 or body < 1:
        raise DatasetError(
            f"samples={samples}, length={length}: expected a sample or more of {len(bos) + 1} tokens or more"
        )
    stream = torch.tensor(_token_stream(documents(source, split=split), tokenizer), dtype=torch.int64)
    windows = stream.numel() // body
    if windows < samples and not (repeat and windows):
        raise DatasetError(
            f"{source}: has {stream.numel()} tokens, but samples × length = {samples} × {length} needs "
            f"{samples * body}: lower calibration.samples or calibration.length, give more text"
            + (" or set calibration.repeat = true" if windows and not repeat else "")
        )
    generator = torch.Generator().manual_seed(seed)
    slack = stream.numel() - windows * body
    start = int(torch.randint(slack + 1, (1,), generator=generator))
    text = _drawn(stream[start : start + windows * body].view(windows, body), samples, generator)
    notes: tuple[str, ...] = ()
    if windows < samples:
        text = torch.cat([text, *_shifted(stream, body, start, samples - windows, generator)])
        notes = (
            f"{source}: {samples} samples of {stream.numel():,} tokens, each token seen "
            f"{samples * body / stream.numel():.1f} times, at other offsets",
        )
    ids = torch.cat([torch.tensor(bos, dtype=torch.int64).expand(samples, -1), text], dim=1).contiguous()
    return TokenSet(ids, token_hash(ids), str(source), notes)


def _drawn(windows: torch.Tensor, most: int, generator: torch.Generator) -> torch.Tensor:
    return windows[torch.randperm(len(windows), generator=generator)[:most]]


def _shifted(
    stream: torch.Tensor, body: int, start: int, samples: int, generator: torch.Generator
) -> Iterator[torch.Tensor]:
    """`samples` further windows of a stream that was cut at `start`: all of one cut before those of the next.

    Offsets are spread evenly over a window, or over what a stream shorter than two windows leaves of it.
    """
    places = min(body, stream.numel() - body + 1)
    rounds = 1 + math.ceil(samples / max(1, stream.numel() // body - 1))
    for index in range(1, rounds):
        at = (start + index * places // rounds) % places
        windows = stream[at : at + (stream.numel() - at) // body * body].view(-1, body)
        yield _drawn(windows, samples, generator)
        samples -= min(samples, len(windows))


def collected_ids(path: Path, samples: int, length: int) -> torch.Tensor:
    """Token ids that the tutorial's collector wrote: `{"loader": [(ids, target), …]}`, ids `(1, n)` or `(n,)`.

    Returns int64 `(samples, length)`: the first samples, cut to `length`. Nothing in the file is executed.

    Raises:
        DatasetError: no such file, another content, or too few or too short samples.
    """
    if not path.is_file():
        raise DatasetError(f"{path}: no such file")
    try:
        _check_stored(path)
        rows = [torch.as_tensor(entry[0]) for entry in torch.load(path, weights_only=True)["loader"]]
    except DatasetError:
        raise
    except Exception as error:
        # The reader of a damaged file raises whatever its bytes happen to run into.
        raise DatasetError(
            f"{path}: expected a dictionary with 'loader', a list of (ids, target): {type(error).__name__}: {error}"
        ) from error
    if any(row.is_floating_point() or row.is_complex() or row.dtype == torch.bool for row in rows):
        raise DatasetError(f"{path}: token ids are whole numbers, and these are not")
    if sum(row.nbytes for row in rows) > path.stat().st_size:
        raise DatasetError(f"{path}: its tensors have more elements than it holds bytes for: they repeat themselves")
    rows = [row.reshape(-1) for row in rows]
    fitting = [row for row in rows if row.numel() >= length]
    if len(fitting) < samples:
        raise DatasetError(
            f"{path}: {len(fitting)} of {len(rows)} samples have {length} tokens or more, and {samples} are asked for: "
            "lower calibration.samples or calibration.length"
        )
    return torch.stack([row[:length] for row in fitting[:samples]]).to(torch.int64)


def _check_stored(path: Path) -> None:
    """Before any of it is read: a zip file as ``torch.save`` writes it, its entries as large as they lie there."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise DatasetError(f"{path}: has compressed entries, which torch.save does not write")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise DatasetError(f"{path}: its entries are larger than the file: it is damaged")


def documents(source: str | Path, *, split: str = "train") -> list[str]:
    """All non-empty documents of a hub data set or of local files, in a fixed order.

    A .txt file is one document; a folder gives its .txt files sorted by name; a .jsonl line or .parquet row
    gives its `text`.

    Raises:
        DatasetError: unknown name, hub unreachable, malformed file, or no text.
    """
    name = str(source)
    found: list[str] = []
    room = _CHARACTERS
    for text in _read(name, split):
        if (room := room - len(text)) < 0:
            raise DatasetError(f"{name}: holds more than {_CHARACTERS:,} characters; give a part of it")
        if text.strip():
            found.append(text)
    if not found:
        raise DatasetError(f"{name}: holds no text")
    return found


def check_source(source: str | Path, *, hub: bool = True) -> None:
    """Raise ``DatasetError`` for an unknown name, a missing path or a suffix that is not read; nothing is read.

    ``hub``: whether the name of a hub data set may be given.
    """
    if not hub and str(source) in _HUB and not Path(source).exists():
        raise DatasetError(f"{source}: no such file or folder; expected {_LOCAL_FORMS}")
    _read(str(source), "")


def token_hash(ids: torch.Tensor) -> str:
    """blake2b-256 hex digest of shape and little-endian int64 bytes of `ids`."""
    digest = hashlib.blake2b(repr(tuple(ids.shape)).encode(), digest_size=32)
    digest.update(ids.to("cpu", torch.int64).contiguous().numpy().astype("<i8", copy=False).tobytes())
    return digest.hexdigest()


def leading_bos(tokenizer: Any) -> list[int]:
    """`[bos_token_id]` if the tokenizer begins a text with it of its own accord, else `[]`."""
    bos = getattr(tokenizer, "bos_token_id", None)
    ids = tokenizer("a", add_special_tokens=True)["input_ids"]
    return [bos] if bos is not None and list(ids)[:1] == [bos] else []


def _token_stream(texts: list[str], tokenizer: Any) -> list[int]:
    # One call for all documents: a fast tokenizer works on them in parallel.
    encoded = tokenizer([*texts, SEPARATOR], add_special_tokens=False)["input_ids"]
    *bodies, separator = encoded
    joined = itertools.chain.from_iterable((*body, *separator) for body in bodies)
    stream = list(joined)
    return stream[: len(stream) - len(separator)]


def _read(name: str, split: str) -> Iterator[str]:
    if name in _HUB:
        return _from_hub(name, split)
    path = Path(name)
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        return _file(path)
    expected = f"expected one of {', '.join(_HUB)}, or {_LOCAL_FORMS}"
    if path.suffix or len(path.parts) > 1:
        raise DatasetError(f"{name}: no such file or folder; {expected}")
    raise DatasetError(f"unknown data set {name!r}, nearest is {nearest(name, _HUB, cutoff=0.0)!r}; {expected}")


def _folder(path: Path) -> Iterator[str]:
    files = sorted(path.glob("*.txt"))
    if not files:
        file = next((file for file in sorted(path.iterdir()) if file.suffix in (".jsonl", ".parquet")), None)
        hint = f"; did you mean '{file}'?" if file is not None else ""
        raise DatasetError(f"{path}: holds no .txt file; expected {_LOCAL_FORMS}{hint}")
    return (text_of(file) for file in files)


def _file(path: Path) -> Iterator[str]:
    readers: dict[str, Callable[[Path], Iterator[str]]] = {
        ".txt": lambda file: (text_of(one) for one in (file,)),
        ".jsonl": _jsonl,
        ".parquet": _parquet,
    }
    if path.suffix not in readers:
        raise DatasetError(f"{path}: cannot read {path.suffix or 'a file without suffix'}; expected {_LOCAL_FORMS}")
    return readers[path.suffix](path)


def text_of(path: Path) -> str:
    """All of a file. Raises ``DatasetError`` for one that is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path}: is not UTF-8 (byte {error.start}); convert it first") from error


def json_lines(path: Path) -> Iterator[tuple[int, object]]:
    """Number and value of each line of a file that is not blank. Raises ``DatasetError``."""
    for number, line in enumerate(text_of(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield number, parse_json(line, f"{path}:{number}")
        except DamagedFile as error:
            raise DatasetError(str(error)) from error


def _jsonl(path: Path) -> Iterator[str]:
    for number, row in json_lines(path):
        if not isinstance(row, dict) or not isinstance(row.get(_TEXT_KEY), str):
            has = ", ".join(map(repr, row)) if isinstance(row, dict) else type(row).__name__
            raise DatasetError(f'{path}:{number}: expected an object with a string "{_TEXT_KEY}", found {has}')
        try:
            row[_TEXT_KEY].encode()
        except UnicodeEncodeError as error:
            raise DatasetError(f"{path}:{number}: the text is no Unicode (half a pair at {error.start})") from error
        yield row[_TEXT_KEY]


def _parquet(path: Path) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
        columns = {field.name: field.type for field in table.schema_arrow}
        if _TEXT_KEY not in columns:
            raise DatasetError(f'{path}: expected a column "{_TEXT_KEY}", found {", ".join(columns)}')
        kind = columns[_TEXT_KEY]
        if kind not in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()) and not (
            pyarrow.types.is_dictionary(kind) and kind.value_type in (pyarrow.string(), pyarrow.large_string())
        ):
            raise DatasetError(f'{path}: expected strings in the column "{_TEXT_KEY}", found {kind}')
        # A dictionary may hold one long text for many rows: few are taken out at a time.
        for batch in table.iter_batches(columns=[_TEXT_KEY], batch_size=_ROWS):
            yield from (text or "" for text in batch.column(0).to_pylist())
    except (pyarrow.ArrowException, OSError, ValueError, MemoryError) as error:
        # Damage shows in the footer or in a page, as an error of Arrow's, of reading or of decoding.
        if isinstance(error, DatasetError):
            raise
        raise DatasetError(f"{path}: is not a parquet file, or a damaged one: {error}") from error


@dataclass(frozen=True)
class _HubSource:
    """How `datasets.load_dataset` gets it, which column is the text, how many rows at most."""

    arguments: dict[str, Any]
    column: str = "text"
    rows: int | None = None


_HUB = {
    "wikitext2": _HubSource({"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1"}),
    "c4": _HubSource({"path": "allenai/c4", "name": "en", "streaming": True}, rows=_C4_DOCUMENTS),
    # The repository's loading script is refused by datasets 4; the hub keeps a converted copy of its rows.
    "ptb": _HubSource({"path": "ptb-text-only/ptb_text_only", "revision": "refs/convert/parquet"}, column="sentence"),
}


def _from_hub(name: str, split: str) -> Iterator[str]:
    import datasets

    source = _HUB[name]
    try:
        with reached():
            rows = datasets.load_dataset(**source.arguments, split=split)
        for row in itertools.islice(rows, source.rows):
            yield row[source.column]
    except Exception as error:
        # Every layer below (datasets, huggingface_hub, the HTTP client) raises its own kinds.
        raise DatasetError(
            f"could not load {name!r} (split {split!r}, {source.arguments['path']} on the Hugging Face hub): "
            f"{type(error).__name__}: {error}\nOffline, give a local data set instead: {_LOCAL_FORMS}"
        ) from error
