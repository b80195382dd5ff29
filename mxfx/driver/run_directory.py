"""The directory of a run: every path in it, and a lock so that one run at a time writes there."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from mxfx.ground.errors import MxfxError
from mxfx.ground.files import write_json, write_text

RESULTS, REPORT, LOCK, PIPELINE = "results.json", "report.html", ".lock", "pipeline.toml"

#: What a pipeline cannot be called: the float model's row and the files beside the pipelines' folders.
RESERVED = frozenset({"float", RESULTS, REPORT, LOCK})


class RunError(MxfxError, ValueError):
    """A run directory cannot be used."""


class NoRun(RunError):
    """A folder is not what a run leaves."""


@dataclass(frozen=True)
class PipelineFolder:
    """What one pipeline of a run leaves."""

    path: Path

    @property
    def pipeline(self) -> Path:
        return self.path / PIPELINE

    @property
    def ir(self) -> Path:
        return self.path / "ir"

    @property
    def repro(self) -> Path:
        return self.path / "repro"

    @property
    def cache(self) -> Path:
        return self.path / "cache"

    @property
    def weights(self) -> Path:
        return self.path / "weights.json"

    @property
    def model(self) -> Path:
        return self.path / "model"

    def begin(self, pipeline: str) -> None:
        """Write the resolved pipeline; what an earlier run left here goes, but for its cache."""
        from mxfx.evaluation.compare import FILE, SAMPLES

        if self.pipeline.is_file():
            for folder in (self.ir, self.repro, self.model, self.path / "decode"):
                shutil.rmtree(folder, ignore_errors=True)
            for file in (self.weights, self.path / FILE, *self.path.glob(f"{SAMPLES}*.jsonl")):
                file.unlink(missing_ok=True)
        write_text(self.pipeline, pipeline)


class RunDirectory:
    """``with RunDirectory(OUT) as run:`` makes and locks the directory; ``begin`` takes what an earlier run found.

    Raises ``RunError`` if it cannot be made, or another run holds it.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._lock = FileLock(root / LOCK, timeout=0)

    def __enter__(self) -> RunDirectory:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except Timeout as error:
            raise RunError(f"another run writes to {self.root}; wait for it, or give another --out") from error
        except OSError as error:
            raise RunError(f"--out {self.root} cannot be made a folder: {error.strerror}; give another") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    def begin(self) -> None:
        """Remove the results of an earlier run, once it is known that this one's model can be read."""
        for name in (RESULTS, REPORT):
            (self.root / name).unlink(missing_ok=True)

    def pipeline(self, name: str) -> PipelineFolder:
        return PipelineFolder(self.root / name)

    def write_results(self, document: Any) -> None:
        """``results.json``, and the page that is made from it."""
        write_json(self.root / RESULTS, document)
        write_report(self.root)


def is_reserved(name: str) -> bool:
    """Whether a row or file of something else than a pipeline has that name."""
    return name in RESERVED or name.startswith("float ")


def check_names(names: Iterable[str]) -> str | None:
    """Why pipelines cannot be run under these names in one directory; None if they can."""
    seen: set[str] = set()
    names = list(names)
    for name in names:
        if is_reserved(name):
            return f"a pipeline cannot be called {name!r}: the run writes something else under that name"
        of_steps = f"{name} decode"
        if of_steps in names:
            return f"a pipeline cannot be called {of_steps!r} beside {name!r}, whose single steps have that row"
        # Some file systems do not tell cases apart.
        if name.casefold() in seen:
            return f"two pipelines are called {name!r}"
        seen.add(name.casefold())
    return None


def write_report(folder: str | Path) -> Path:
    """Make ``report.html`` from what a run left in its directory. Raises ``NoRun`` for a folder that is none."""
    from mxfx.report.html import page

    folder = Path(folder)
    if not (folder / RESULTS).is_file():
        raise NoRun(f"{folder} has no {RESULTS}; give the folder that `mxfx run --out` wrote")
    try:
        write_text(folder / REPORT, page(folder))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise NoRun(
            f"{folder / RESULTS} is damaged ({type(error).__name__}: {error}): run the pipelines again"
        ) from error
    return folder / REPORT


def find_pipeline(folder: str | Path) -> PipelineFolder:
    """The folder of one pipeline inside a run directory: itself, or the only one in it. Raises ``NoRun``."""
    folder = Path(folder)
    if (folder / PIPELINE).is_file():
        return PipelineFolder(folder)
    found = [path.parent for path in sorted(folder.glob(f"*/{PIPELINE}"))]
    if not found:
        raise NoRun(f"{folder} holds no {PIPELINE}; give the folder that `mxfx run --out` wrote")
    if len(found) > 1:
        raise NoRun(f"{folder} holds several pipelines; name one: {', '.join(map(str, found))}")
    return PipelineFolder(found[0])


def find_model(folder: str | Path) -> Path:
    """The emitted model's folder in a run directory: the folder itself, ``DIR/model``, or the only ``DIR/*/model``.

    Raises ``NoRun`` where there are several, and for a name that a run directory does not hold.
    """
    folder = Path(folder)
    beside = [path.parent.name for path in sorted(folder.parent.glob(f"*/{PIPELINE}"))]
    if beside and not folder.exists():
        raise NoRun(f"{folder.parent} holds no {folder.name}; it holds {', '.join(beside)}")
    found = [path for path in (folder / "model", *sorted(folder.glob("*/model"))) if path.is_dir()]
    if len(found) > 1:
        names = ", ".join(str(path.parent) for path in found)
        raise NoRun(f"{folder} holds several emitted models; name one: {names}")
    return found[0] if found else folder
