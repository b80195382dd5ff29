"""Facts: named predicates on a program that passes require, provide and forbid.

A fact is *verified*, not only declared: its predicate looks at the graph and returns the first reason why the fact
does not hold, or None. ``apply`` runs it after the pass that provides the fact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mxfx.graph.program import Program
from mxfx.ground.errors import MxfxError
from mxfx.ground.nearest import did_you_mean

Predicate = Callable[[Program], str | None]


class FactError(MxfxError, ValueError):
    """A pass needs a fact that does not hold, forbids one that holds, or did not provide what it promised."""


@dataclass(frozen=True)
class Fact:
    name: str
    meaning: str
    check: Predicate


_FACTS: dict[str, Fact] = {}


def fact(name: str, meaning: str) -> Callable[[Predicate], Predicate]:
    """Decorator: define a fact by its predicate. Raises ``ValueError`` if the name is taken by another predicate."""

    def define(check: Predicate) -> Predicate:
        known = _FACTS.get(name)
        if known is not None and known.check.__qualname__ != check.__qualname__:
            raise ValueError(f"fact {name!r} is already defined by {known.check.__qualname__}")
        _FACTS[name] = Fact(name, meaning, check)
        return check

    return define


def find_fact(name: str) -> Fact:
    """The fact of that name; ``FactError`` names the nearest one."""
    if name in _FACTS:
        return _FACTS[name]
    raise FactError(f"unknown fact {name!r}; {did_you_mean(name, _FACTS)}".removesuffix("; "))


def all_facts() -> dict[str, Fact]:
    return dict(_FACTS)
