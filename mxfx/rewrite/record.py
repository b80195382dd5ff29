"""What one run of one pass did: matches, skips with reasons, expectations, warnings."""

from __future__ import annotations

from dataclasses import dataclass, field

from mxfx.ground.errors import MxfxError


class ExpectationError(MxfxError, ValueError):
    """A pass or a rule matched nothing, or another number of places than its ``expect`` says.

    ``rule`` is the rule's number, from 1, so that the pipeline can cite its line.
    """

    def __init__(self, message: str, rule: int | None = None) -> None:
        super().__init__(message)
        self.rule = rule


@dataclass(frozen=True)
class Match:
    """One place that a pass rewrote. ``index`` counts from 1 and is the ``m`` of a bisect point ``n.m``."""

    index: int
    node: str
    path: str
    note: str = ""
    rule: str = ""


@dataclass(frozen=True)
class Skip:
    """One candidate that a pass left alone, and why. ``depth`` ranks near misses: how much of a pattern fitted.

    ``done``: it is as the pass would leave it, so that skipping it is no sign of a pass that does not fit the model.
    """

    node: str
    path: str
    reason: str
    rule: str = ""
    depth: int = 0
    done: bool = False


@dataclass
class PassRecord:
    """The account of one pass over one program."""

    name: str
    matches: list[Match] = field(default_factory=list)
    skips: list[Skip] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    touched: set[str] = field(default_factory=set)
    details: dict[str, object] = field(default_factory=dict)
    limited: bool = False

    @property
    def changed(self) -> bool:
        return bool(self.touched)

    def to_json(self) -> dict[str, object]:
        return {
            "pass": self.name,
            "matched": [vars(match) for match in self.matches],
            "skipped": [vars(skip) for skip in self.skips],
            "warnings": self.warnings,
            "details": self.details,
        }
