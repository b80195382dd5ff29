"""Prompts of a task by the names that PLENA gives them: ``hf:``, ``jsonl:``, ``txt:``, each row through a template.

============================================  ==========================================================================
``hf:PATH[:CONFIG[:SPLIT[:COLUMN,COLUMN]]]``  rows of a hub data set, shuffled by seed 0; the first text column without
``jsonl:FILE[:FIELD,FIELD]``                  one object a line; the field ``text`` without
``txt:FILE``                                  one prompt a line, called ``text`` in a template
anything else                                 what ``calibration.dataset`` takes: documents, called ``text``
============================================  ==========================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mxfx.calibration.datasets import DatasetError, check_source, documents, json_lines, text_of
from mxfx.ground.hub import reached

_TEXT = "text"


def prompts(source: str, template: str | None = None) -> Iterator[str]:
    """Every prompt of ``source``: its columns joined by newlines, or ``template`` with their names in braces.

    Raises ``DatasetError``: no such file, column or data set, or a row that is none.
    """
    kind, _, rest = source.partition(":")
    rows, columns = _READERS.get(kind, lambda _: _documents(source))(rest)
    for number, row in rows:
        if template is None:
            missing = next((name for name in columns if name not in row), None)
            if missing is not None:
                raise DatasetError(f"{source}, row {number}: no {missing!r}; the row has {', '.join(row)}")
            yield "\n".join(str(row[name]) for name in columns)
            continue
        try:
            yield template.format(**row)
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            raise DatasetError(
                f"the template {template!r} does not fit row {number} of {source}: {error}; expected names in braces, "
                f"of {', '.join(row)}"
            ) from error


def check_prompts(source: str) -> None:
    """Raise ``DatasetError`` for a file that is not there or an unknown name; nothing is read."""
    kind, _, rest = source.partition(":")
    if kind in ("jsonl", "txt"):
        _existing(rest.split(":")[0])
    elif kind != "hf":
        check_source(source)


Rows = tuple[Iterator[tuple[int, Mapping[str, Any]]], list[str]]


def _documents(source: str) -> Rows:
    return enumerate(({_TEXT: text} for text in documents(source)), start=1), [_TEXT]


def _txt(rest: str) -> Rows:
    lines = text_of(_existing(rest)).splitlines()
    return ((number, {_TEXT: line}) for number, line in enumerate(lines, start=1) if line), [_TEXT]


def _jsonl(rest: str) -> Rows:
    name, _, fields = rest.partition(":")
    path = _existing(name)

    def rows() -> Iterator[tuple[int, Mapping[str, Any]]]:
        for number, row in json_lines(path):
            if not isinstance(row, dict):
                raise DatasetError(f"{path}:{number}: expected an object, found {type(row).__name__}")
            yield number, row

    return rows(), fields.split(",") if fields else [_TEXT]


def _hub(rest: str) -> Rows:
    import datasets

    path, config, split, named = (rest.split(":", 3) + [""] * 3)[:4]
    try:
        with reached():
            found = datasets.load_dataset(path, config or None, split=split or "train").shuffle(seed=0)
    except Exception as error:
        # Every layer below (datasets, huggingface_hub, the HTTP client) raises its own kinds.
        raise DatasetError(
            f"could not load hf:{rest} from the Hugging Face hub: {type(error).__name__}: {error}\n"
            "Offline, give jsonl:FILE:FIELD or txt:FILE"
        ) from error
    strings = [name for name, feature in found.features.items() if getattr(feature, "dtype", None) == "string"]
    columns = named.split(",") if named else strings[:1]
    if not columns:
        raise DatasetError(f"hf:{rest}: has no text column; name some: hf:{path}:{config}:{split or 'train'}:a,b")
    return enumerate(found, start=1), columns


_READERS: Mapping[str, Callable[[str], Rows]] = {"hf": _hub, "jsonl": _jsonl, "txt": _txt}


def _existing(name: str) -> Path:
    path = Path(name)
    if not path.is_file():
        raise DatasetError(f"{name}: no such file; expected jsonl:FILE[:FIELD] or txt:FILE")
    return path
