"""A pipeline as a value: the model, the calibration data, the budget, and the passes in order."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mxfx.config import options
from mxfx.config.emit import EmitConfig, emit_stage
from mxfx.config.errors import ConfigError, Place
from mxfx.config.locate import Cursor, Document, KeyPath, parse_toml, read_toml
from mxfx.config.phases import PhasesConfig
from mxfx.config.spec import NOWHERE, PassSpec, unknown_pass
from mxfx.ground.nearest import did_you_mean
from mxfx.rewrite import Pass

#: Every pipeline starts with these, visibly; one that the pipeline lists itself is not added.
RAISE_PASSES = ("raise-norm", "raise-rope", "raise-attention", "split-fused")


@dataclass(frozen=True)
class ModelConfig:
    """The model to compile.

    name: Hub id (``HuggingFaceTB/SmolLM2-135M-Instruct``) or a local folder.
    dtype: precision that the model is loaded in and the emitted graph runs in.
    revision: branch, tag or commit on the hub.
    """

    name: str | None = None
    dtype: Literal["bfloat16", "float16", "float32", "float64"] = "bfloat16"
    revision: str | None = None


@dataclass(frozen=True)
class CalibrationConfig:
    """The token ids, ``(samples, length)``, that passes see.

    dataset: ``wikitext2``, ``c4``, ``ptb``, a local text, jsonl or parquet file, or ``self``: texts sampled from the
        float model; or an array of such sources.
    shares: of the samples, one number for each source; equal where none are given.
    samples: number of sequences.
    length: tokens in each.
    seed: which sequences are drawn, and every other random choice of the run.
    repeat: read a text that is too short for its samples again, cut at other places; a run says how often. Samples that
        a pass holds out, as distill does, then share tokens with others.
    continued: of the samples of ``self`` the part, from 0 to 1, that the float model does not begin but goes on with,
        from 64 tokens each of the other sources: texts of their kind, as many as wanted.
    """

    dataset: str | tuple[str, ...] | None = None
    samples: int = 32
    length: int = 512
    seed: int = 0
    shares: tuple[float, ...] = ()
    repeat: bool = False
    continued: float = 0.0

    def __post_init__(self) -> None:
        for name in ("samples", "length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name!r} is {getattr(self, name)}, must be at least 1")
        if not 0 <= self.seed < 1 << 63:
            raise ValueError(f"'seed' is {self.seed}, must be a number from 0 to 2^63 - 1")
        if self.dataset == ():
            raise ValueError("'dataset' is empty, expected a source or several")
        if len(set(self.sources)) < len(self.sources):
            raise ValueError(f"'dataset' is {list(self.sources)}, expected each source once; shares say how much of it")
        if self.repeat and self.sources == ("self",):
            raise ValueError(
                "'repeat' reads texts again, and dataset is self alone, which writes as many as are wanted"
            )
        if self.shares and (len(self.shares) != len(self.sources) or not min(self.shares) > 0):
            raise ValueError(f"'shares' are {list(self.shares)}, expected a positive number for each source of dataset")
        if not 0 <= self.continued <= 1:
            raise ValueError(f"'continued' is {self.continued}, must be between 0 and 1")
        if self.continued and not {"self"} < set(self.sources):
            raise ValueError("'continued' needs both self and a source of openings in dataset")

    @property
    def sources(self) -> tuple[str, ...]:
        """The data sets by name; ``wikitext2`` where none is named."""
        if self.dataset is None:
            return ("wikitext2",)
        return (self.dataset,) if isinstance(self.dataset, str) else self.dataset


@dataclass(frozen=True)
class BudgetConfig:
    """How much a pipeline may lose before the run stops.

    max_ppl_ratio: perplexity over that of the float model, at least 1.
    max_kl: mean KL divergence of the next-token distribution from the float model's, in nats.
    """

    max_ppl_ratio: float | None = None
    max_kl: float | None = None

    def __post_init__(self) -> None:
        if self.max_ppl_ratio is not None and not self.max_ppl_ratio >= 1:
            raise ValueError(f"'max_ppl_ratio' is {self.max_ppl_ratio}, must be at least 1")
        if self.max_kl is not None and not self.max_kl > 0:
            raise ValueError(f"'max_kl' is {self.max_kl}, must be positive")


#: The tables of a pipeline file beside ``[[pass]]``.
SETTINGS: dict[str, type] = {
    "model": ModelConfig,
    "calibration": CalibrationConfig,
    "budget": BudgetConfig,
    "emit": EmitConfig,
    "phases": PhasesConfig,
}


@dataclass(frozen=True, init=False)
class Pipeline:
    """Passes in order, with what they run on. ``Pipeline([FuseNorm(), RoundWeights()])``.

    Iterating gives the typed passes. Equality looks at values, not at places or at how a value was written.
    """

    specs: tuple[PassSpec, ...]
    model: ModelConfig
    calibration: CalibrationConfig
    budget: BudgetConfig
    emit: EmitConfig
    phases: PhasesConfig
    root: Cursor = field(compare=False, repr=False)

    def __init__(
        self,
        passes: Iterable[Pass | PassSpec] = (),
        model: ModelConfig | str | None = None,
        calibration: CalibrationConfig | None = None,
        budget: BudgetConfig | None = None,
        emit: EmitConfig | None = None,
        phases: PhasesConfig | None = None,
        root: Cursor = NOWHERE,
    ) -> None:
        specs = tuple(p if isinstance(p, PassSpec) else PassSpec.of(p) for p in passes)
        object.__setattr__(self, "specs", specs)
        object.__setattr__(self, "model", ModelConfig(name=model) if isinstance(model, str) else model or ModelConfig())
        object.__setattr__(self, "calibration", calibration or CalibrationConfig())
        object.__setattr__(self, "budget", budget or BudgetConfig())
        object.__setattr__(self, "emit", emit or EmitConfig())
        object.__setattr__(self, "phases", phases or PhasesConfig())
        object.__setattr__(self, "root", root)

    @property
    def source(self) -> str:
        """Name of the file that the pipeline was read from."""
        return self.root.source

    @property
    def passes(self) -> tuple[Pass, ...]:
        """The typed passes. Raises ``ConfigError`` at the first entry whose pass is not registered."""
        return tuple(spec.typed() for spec in self.specs)

    def __iter__(self) -> Iterator[Pass]:
        return iter(self.passes)

    def __len__(self) -> int:
        return len(self.specs)

    def completed(self) -> Pipeline:
        """With all raise passes in front, unless the pipeline lists one of them: then it lists what it wants."""
        if any(spec.name in RAISE_PASSES for spec in self.specs):
            return self
        register_passes()
        raised = [PassSpec.read(name, {}, NOWHERE) for name in RAISE_PASSES]
        return self.replace(specs=(*raised, *self.specs))

    def emitted(self, device: str = "cpu") -> Pipeline:
        """With the emit stage behind, unless the pipeline lowers its program itself.

        ``device`` is the type of the device that the run is on; ``[emit] device`` overrides it. A pass of the stage
        that the pipeline lists is not added again. Raises ``ConfigError`` for a stage that this mxfx cannot make.
        """
        listed = {spec.name for spec in self.specs}
        if "lower" in listed:
            return self
        register_passes()
        added = [
            PassSpec.read(name, options, NOWHERE)
            for name, options in emit_stage(self.emit, device)
            if name not in listed
        ]
        for spec in added:
            if spec.value is None:
                raise unknown_pass(spec.name, self.root / "emit")
        return self.replace(specs=(*self.specs, *added))

    def replace(self, **changes: Any) -> Pipeline:
        """A copy with some of ``specs``, ``model``, ``calibration``, ``budget``, ``emit``, ``phases`` changed."""
        return Pipeline(
            changes.get("specs", self.specs),
            changes.get("model", self.model),
            changes.get("calibration", self.calibration),
            changes.get("budget", self.budget),
            changes.get("emit", self.emit),
            changes.get("phases", self.phases),
            changes.get("root", self.root),
        )

    def location(self, index: int, option: KeyPath = ()) -> Place:
        """Where an option of pass ``index`` stands; rules count from 0: ``location(3, ("rule", 2,
        "match"))``.

        The nearest place around it if the option was not written; ``str(place)`` is ``FILE:LINE:COLUMN``.
        """
        return self._at(index, option).place()

    def error(self, index: int, option: KeyPath, problem: str, expected: str = "", hint: str = "") -> ConfigError:
        """An error about an option of pass ``index``, found later than on reading, citing its line."""
        return self._at(index, option).error(problem, expected, hint)

    def _at(self, index: int, option: KeyPath) -> Cursor:
        return self.specs[index].at.below(option)

    def model_source(self) -> Path | str:
        """The model's folder, or its hub id. Reads nothing but the folder's listing.

        Raises ``ConfigError`` if no model is named, or a name that must be a path is no model folder.
        """
        at = self.root / "model" / "name"
        if self.model.name is None:
            raise at.error(
                "no model is named",
                "a hub id or a local folder",
                'write [model] name = "…", or give --model on the command line',
            )
        return find_model(self.model.name, at)


def load(path: str | Path) -> Pipeline:
    """Read a pipeline file, check all of it, and put the raise passes in front.

    Raises ``ConfigError`` with ``FILE:LINE:COLUMN`` at the first thing that is wrong.
    """
    return from_document(read_toml(path))


def loads(text: str, source: str = "<text>") -> Pipeline:
    """As ``load``, from TOML text; ``source`` names it in messages."""
    return from_document(parse_toml(text, source))


def from_document(document: Document) -> Pipeline:
    """The pipeline of a parsed file. One without passes says so: ``pass = []``."""
    register_passes()
    root, raw = document.root, document.value
    for key in raw:
        if key not in SETTINGS and key != "pass":
            tables = ", ".join(f"[{name}]" for name in SETTINGS)
            raise (root / key).error(f"unknown table {key!r}", f"{tables} or [[pass]]", _near_table(key))
    settings = {
        name: options.read_dataclass(cls, raw[name], root / name, f"[{name}]")
        for name, cls in SETTINGS.items()
        if name in raw
    }
    if "phases" in raw and not settings["phases"].given:
        wanted = "[[phases.decode.rule]] or [[phases.prefill.rule]] with a format"
        raise (root / "phases").error("[phases] has no rules: both phases would be one", wanted)
    if "pass" not in raw:
        wanted = "[[pass]] tables; pass = [] above all tables for the model as it is, in no format"
        raise root.error("the file has no passes", wanted, "`mxfx help pipeline` has a whole file")
    return Pipeline(read_passes(raw["pass"], root / "pass"), **settings, root=root).completed()


def _near_table(key: str) -> str:
    """What a table that is none may be: misspelt, or one of a file of the tutorial's that does not say so."""
    if key.startswith("pass"):
        return "did you mean [[pass]]?"
    near = did_you_mean(key, SETTINGS)
    return near or 'a file in the tutorial\'s dialect says by = "regex_name", and each of its selectors has a name'


def read_passes(entries: object, at: Cursor) -> tuple[PassSpec, ...]:
    """The checked entries of ``[[pass]]``. Raises ``ConfigError``; an unregistered pass is an error here."""
    if not isinstance(entries, list):
        raise at.error("'pass' is one table", "an array of tables: [[pass]] with double brackets")
    return tuple(_read_pass(entry, at / index) for index, entry in enumerate(entries))


def _read_pass(entry: object, at: Cursor) -> PassSpec:
    if not isinstance(entry, Mapping) or "name" not in entry:
        raise at.error("a pass without a name", 'name = "fuse-norm" below [[pass]]')
    name = options.read(str, entry["name"], at / "name")
    spec = PassSpec.read(name, {key: value for key, value in entry.items() if key != "name"}, at)
    if spec.value is None:
        raise unknown_pass(name, at / "name")
    return spec


def register_passes() -> None:
    """Import mxfx's own passes and those of installed plug-ins, so that their names are known."""
    from mxfx import passes
    from mxfx.rewrite import load_plugins

    passes.load_all()
    load_plugins()


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def find_model(name: str, at: Cursor) -> Path | str:
    """A model folder as a path, what can be a hub id as it is. Raises ``ConfigError`` at ``at``."""
    wrong = no_model(name)
    if wrong is not None:
        raise at.error(*wrong)
    folder = Path(name).expanduser()
    return folder if folder.is_dir() else name


def no_model(name: str) -> tuple[str, str, str] | None:
    """Why a name stands for no model: problem, what is expected, hint. None for a folder and what can be a hub id."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        if (folder / "config.json").is_file():
            return None
        return f"{name!r} has no config.json", "a folder saved by save_pretrained, or a hub id", ""
    expected = "a local model folder, or a hub id such as 'unsloth/Llama-3.2-1B'"
    if folder.exists():
        return f"{name!r} is a file", expected, ""
    if _HUB_ID.fullmatch(name):
        return None
    return f"no folder {name!r}", expected, _near_folder(folder)


def _near_folder(folder: Path) -> str:
    if not folder.parent.is_dir():
        return f"the folder {str(folder.parent)!r} does not exist either"
    return did_you_mean(folder.name, [entry.name for entry in folder.parent.iterdir() if entry.is_dir()])


def settings_of(pipeline: Pipeline) -> dict[str, dict[str, Any]]:
    """The tables beside ``[[pass]]`` in TOML form: each one that differs from its defaults, with all its
    values.
    """
    tables = {}
    for name, cls in SETTINGS.items():
        value = getattr(pipeline, name)
        if value != cls():
            tables[name] = options.write_fields(value, frozenset(f.name for f in dataclasses.fields(cls)))
    return tables
