"""Passes that do nothing, with options of every type that a pass may have."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from mxfx.formats import Format
from mxfx.rewrite import ALL, Context, Fact, Pass, Rewriter, Selector, pass_
from mxfx.rewrite.expect import check

MARKED = Fact("stub-marked", "operands are marked")
ROUNDED = Fact("stub-rounded", "weights are rounded by a stub")


class Idle(Pass):
    def run(self, rw: Rewriter, ctx: Context) -> None:
        raise AssertionError("a stub does not run")


@dataclass(frozen=True)
class Rule:
    """One rule.

    match: module paths.
    weight: format of the weight, which the
        docstring continues here.
    """

    match: Selector
    weight: Format | None = None
    input: Format | None = None
    expect: str | None = None

    def __post_init__(self) -> None:
        if self.expect is not None:
            check(self.expect)


@dataclass(frozen=True)
class Mark(Idle):
    """Mark operands with formats.

    rule: tried in order.
    """

    name: ClassVar[str] = "stub-mark"
    provides: ClassVar[frozenset[Fact]] = frozenset({MARKED})
    forbids: ClassVar[frozenset[Fact]] = frozenset({ROUNDED})
    rule: tuple[Rule, ...] = ()


@dataclass(frozen=True)
class Solve(Idle):
    """Solve for weights.

    damp: added to the diagonal, as a fraction of its mean.
    """

    name: ClassVar[str] = "stub-solve"
    requires: ClassVar[frozenset[Fact]] = frozenset({MARKED})
    provides: ClassVar[frozenset[Fact]] = frozenset({ROUNDED})
    select: Selector = ALL
    damp: float = 0.01
    samples: int | None = None
    sweep: bool = True
    order: Literal["block", "none"] = "block"
    note: str = ""
    cache: Path | None = None
    sites: tuple[str, ...] = ("q_proj",)
    grid: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        if self.damp < 0:
            raise ValueError(f"'damp' is {self.damp}, must not be negative")


@dataclass(frozen=True)
class Need(Idle):
    """A pass with an option that has no default."""

    name: ClassVar[str] = "stub-need"
    format: Format


STUBS = (Mark, Solve, Need)


@contextmanager
def registered(*classes: type[Pass]) -> Iterator[None]:
    """Register passes for a while."""
    before = dict(pass_._REGISTRY)
    for cls in classes:
        pass_.register(cls)
    try:
        yield
    finally:
        pass_._REGISTRY.clear()
        pass_._REGISTRY.update(before)
