"""The contract of a pass, and the registry that finds passes by name.

A pass is a frozen dataclass. Its class variables are its contract, its fields are its options, and ``run`` edits
one program through a ``Rewriter``. It prints nothing, times nothing and cleans up nothing: the pass manager's
instruments do.
"""

from __future__ import annotations

import importlib.metadata
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, TypeVar

from torch import fx

from mxfx.graph.node import kind
from mxfx.ground.errors import MxfxError
from mxfx.ground.nearest import did_you_mean
from mxfx.rewrite.facts import Fact, FactError, find_fact
from mxfx.rewrite.numerics import Lossy, Numerics

if TYPE_CHECKING:
    from mxfx.rewrite.context import Context
    from mxfx.rewrite.rewriter import Rewriter

ENTRY_POINT_GROUP = "mxfx.passes"


class UnknownPass(MxfxError, ValueError):
    """No pass of that name is registered."""


@dataclass(frozen=True)
class Pass(ABC):
    """Base of every pass; see the module's docstring and design: one file, one frozen dataclass, pure.

    Class variables
        name: kebab-case; the same in TOML, on the command line, in dumps and as the test's file name.
        requires: facts that must hold before. provides: facts that hold after.
        forbids: facts that must not hold before.
        expects: facts that passes behind it are to bring about, or it was for nothing: a run without is warned.
        numerics: the promise, checked by the manager.
        required: the pass may not be skipped by ``bisect``: later passes could not run without it.
        by_phase: of a pipeline with phases it may run for each by itself: keys and values stay in one basis.

    Fields are options; a docstring says each in a line ``name: words``. One is the same wherever it stands:

    select: which nodes the pass may change, by a regular expression that the whole module path matches.
    """

    name: ClassVar[str] = ""
    requires: ClassVar[frozenset[Fact]] = frozenset()
    provides: ClassVar[frozenset[Fact]] = frozenset()
    forbids: ClassVar[frozenset[Fact]] = frozenset()
    expects: ClassVar[frozenset[Fact]] = frozenset()
    numerics: ClassVar[Numerics] = Lossy()
    required: ClassVar[bool] = False
    by_phase: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: object) -> None:
        """Raises ``FactError`` for a fact that is no ``Fact``: a misspelt one cannot be imported."""
        super().__init_subclass__(**kwargs)
        for fact in (*cls.requires, *cls.provides, *cls.forbids, *cls.expects):
            if not isinstance(fact, Fact):
                raise FactError(
                    f"{cls.__qualname__}: the fact {fact!r} is text; import its object "
                    f"(mxfx.rewrite.facts.{find_fact(fact).upper().replace('-', '_')})"
                )

    def provided(self) -> frozenset[Fact]:
        """The facts that hold after a run with these options; by default those of the class."""
        return self.provides

    def selects(self, node: fx.Node) -> bool:
        """Whether the options make the pass answer for a node: its ``select``, if it has one, matches the path."""
        select = getattr(self, "select", None)
        return select is None or select(node)

    def foresee(self, rw: Rewriter) -> int | None:
        """How many sites the pass would rewrite, as far as the graph alone says; the others are skipped with reasons.

        Sites that are matched to ``rw`` with a note are told with it, such as the block that each axis gets.

        None: it cannot be told before the passes before it ran. The program stays as it is. Raises an error of the
        family where the pass is sure to fail, whatever the passes before it do: it is said before weights are read.
        """
        return None

    @abstractmethod
    def run(self, rw: Rewriter, ctx: Context) -> None:
        """Rewrite ``rw.program`` through ``rw``; every candidate is matched or skipped with a reason."""


@dataclass(frozen=True)
class NodePass(Pass):
    """Base of the passes that visit nodes of some ``kinds``, each by itself, in the order of the graph."""

    kinds: ClassVar[tuple[str, ...]] = ()

    def selects(self, node: fx.Node) -> bool:
        return kind(node) in self.kinds and super().selects(node)

    def refuse(self, rw: Rewriter, node: fx.Node) -> str | None:
        """Why a node stays as it is; None for one to rewrite."""
        return None

    def is_done(self, node: fx.Node) -> bool:
        """Whether a node that is refused is so because it already is what the pass would make of it."""
        return False

    def note(self, node: fx.Node) -> str:
        """What the record says of a match."""
        return ""

    @abstractmethod
    def rewrite(self, rw: Rewriter, node: fx.Node) -> None:
        """Rewrite one node."""

    def foresee(self, rw: Rewriter) -> int | None:
        return sum(1 for _ in self._sites(rw))

    def run(self, rw: Rewriter, ctx: Context) -> None:
        for node in self._sites(rw):
            if rw.match(node, note=self.note(node)):
                self.rewrite(rw, node)

    def _sites(self, rw: Rewriter) -> Iterator[fx.Node]:
        for node in filter(self.selects, rw.program.nodes()):
            reason = self.refuse(rw, node)
            if reason is None:
                yield node
            else:
                rw.skip(node, reason, done=self.is_done(node))


_REGISTRY: dict[str, type[Pass]] = {}
_KEBAB = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


_P = TypeVar("_P", bound=type[Pass])


def register(cls: _P) -> _P:
    """Class decorator: make a pass known by its ``name``. A clash or a malformed name is a ``ValueError``."""
    if not _KEBAB.fullmatch(cls.name):
        raise ValueError(f"{cls.__qualname__}: the pass name {cls.name!r} is not kebab-case (like 'fuse-norm')")
    known = _REGISTRY.get(cls.name)
    if known is not None and known.__qualname__ != cls.__qualname__:
        raise ValueError(
            f"pass name {cls.name!r} is taken by {known.__module__}.{known.__qualname__}; "
            f"rename {cls.__module__}.{cls.__qualname__}"
        )
    _REGISTRY[cls.name] = cls
    return cls


def load_plugins() -> None:
    """Register the passes that installed packages offer through the entry-point group ``mxfx.passes``."""
    for entry in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        loaded = entry.load()
        if not (isinstance(loaded, type) and issubclass(loaded, Pass)):
            raise TypeError(f"entry point {entry.name} = {entry.value} of group {ENTRY_POINT_GROUP} is no Pass class")
        register(loaded)


def all_passes() -> dict[str, type[Pass]]:
    """Every registered pass by name, in the order of registration."""
    return dict(_REGISTRY)


def find_pass(name: str) -> type[Pass]:
    """The pass of that name; ``UnknownPass`` names the nearest one."""
    if name in _REGISTRY:
        return _REGISTRY[name]
    hint = did_you_mean(name, _REGISTRY)
    raise UnknownPass(f"unknown pass {name!r} (`mxfx passes` lists all {len(_REGISTRY)}); {hint}".removesuffix("; "))
