"""Which pass changed which weight: the ledger of a weight store as a JSON document, and questions to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from mxfx.graph.program import Program
from mxfx.ground.errors import MxfxError
from mxfx.ground.files import read_json
from mxfx.ground.nearest import did_you_mean

FILE = "weights.json"


class HistoryError(MxfxError, ValueError):
    """A folder without a weight history, or a weight that the run never had."""


@dataclass(frozen=True)
class Change:
    """One pass's change of one tensor; ``names`` are all its names at that time, tied ones included.

    ``before`` is ``""`` for a new weight. ``error`` is ‖Δ‖ / ‖w‖, None for a new weight or one without data. Equal
    hashes: the weight was untied and holds what it held.
    """

    pass_name: str
    names: tuple[str, ...]
    before: str
    after: str
    error: float | None

    def __post_init__(self) -> None:
        texts = (self.pass_name, *self.names, self.before, self.after)
        if not self.names or not all(isinstance(text, str) for text in texts):
            raise TypeError(f"a change has names and hashes as text, not {texts}")
        if self.error is not None and not isinstance(self.error, float | int):
            raise TypeError(f"the error of a change is a number, not {self.error!r}")

    def __str__(self) -> str:
        if not self.before:
            return f"{self.pass_name}: new, {self.after}"
        if self.before == self.after:
            return f"{self.pass_name}: untied, {self.after}"
        error = "" if self.error is None else f", relative change {self.error:.3g}"
        tied = f" (tied: {', '.join(self.names[1:])})" if len(self.names) > 1 else ""
        return f"{self.pass_name}: {self.before} → {self.after}{error}{tied}"


@dataclass(frozen=True)
class History:
    """All changes of a run in order, and every name that a weight had in it."""

    changes: tuple[Change, ...]
    names: tuple[str, ...]

    @classmethod
    def of(cls, source: Program, result: Program) -> History:
        """What happened to the weights between two programs of one run."""
        aliases = dict(source.weights.aliases)
        changes = []
        for entry in result.weights.ledger[len(source.weights.ledger) :]:
            if entry.before and entry.before == entry.after:
                aliases.pop(entry.weight, None)
            tied = tuple(alias for alias, home in aliases.items() if home == entry.weight)
            changes.append(Change(entry.pass_name, (entry.weight, *tied), entry.before, entry.after, entry.error))
        known = dict.fromkeys([*source.weights, *source.weights.aliases, *result.weights, *result.weights.aliases])
        return cls(tuple(changes), tuple(known))

    @classmethod
    def read(cls, folder: Path) -> History:
        """From the file that a run left. Raises ``HistoryError``."""
        path = folder / FILE
        if not path.is_file():
            raise HistoryError(f"{folder} has no {FILE}; give the folder of one pipeline inside a run directory")
        try:
            said: Mapping = read_json(path)
            changes = tuple(Change(**{**c, "names": tuple(c["names"])}) for c in said["changes"])
            return cls(changes, tuple(map(str, said["names"])))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise HistoryError(
                f"{path} is damaged ({type(error).__name__}: {error}): run the pipeline again"
            ) from error

    def to_json(self) -> dict[str, object]:
        return {"changes": [asdict(change) for change in self.changes], "names": list(self.names)}

    def changed(self, name: str) -> tuple[Change, ...]:
        """The changes of one weight, under whichever of its names. Raises ``HistoryError`` for an unknown one."""
        if name not in self.names and not any(name in change.names for change in self.changes):
            raise HistoryError(
                f"no weight {name!r} was in this run; {did_you_mean(name, self.names)}".removesuffix("; ")
            )
        return tuple(change for change in self.changes if name in change.names)

    def by_weight(self) -> dict[str, tuple[Change, ...]]:
        """Canonical name → its changes, only those that changed."""
        found: dict[str, list[Change]] = {}
        for change in self.changes:
            found.setdefault(change.names[0], []).append(change)
        return {name: tuple(changes) for name, changes in found.items()}
