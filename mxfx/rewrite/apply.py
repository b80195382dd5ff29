"""Run one pass on one program: facts before, rewrite on a copy, facts after."""

from __future__ import annotations

from dataclasses import dataclass

from mxfx.graph.program import Program
from mxfx.rewrite.context import Context
from mxfx.rewrite.facts import FactError
from mxfx.rewrite.pass_ import Pass
from mxfx.rewrite.record import PassRecord
from mxfx.rewrite.rewriter import Rewriter, clean
from mxfx.rewrite.roles import roles_remembered


@dataclass(frozen=True)
class Applied:
    """A program after one pass, and the pass's account."""

    program: Program
    record: PassRecord


def apply(pass_: Pass, program: Program, ctx: Context | None = None, *, limit: int | None = None) -> Applied:
    """Run ``pass_`` on a copy of ``program``.

    ``limit`` stops after that many matches (``bisect``); facts that the pass provides are then not verified, for a
    half-done pass does not provide them.

    Raises ``FactError`` if a required fact is missing, a forbidden one holds, or a provided one is not true after.
    """
    check_facts_before(pass_, program.facts)
    rw = Rewriter(program.copy(), pass_.name, limit)
    pass_.run(rw, ctx or Context())
    clean(rw.program)
    rw.program.facts = facts_after(pass_, program.facts)
    if not rw.record.limited:
        _verify_provided(pass_, rw)
    return Applied(rw.program, rw.record)


def check_facts_before(pass_: Pass, facts: frozenset[str]) -> None:
    """Raise ``FactError`` unless every required fact is there and no forbidden one is."""
    missing = sorted(fact for fact in pass_.requires if fact not in facts)
    if missing:
        raise FactError(f"pass {pass_.name!r} requires {missing[0]!r} ({missing[0].meaning}), which does not hold here")
    present = sorted(fact for fact in pass_.forbids if fact in facts)
    if present:
        raise FactError(f"pass {pass_.name!r} must come before {present[0]!r} holds ({present[0].meaning})")


def facts_after(pass_: Pass, facts: frozenset[str]) -> frozenset[str]:
    """The names of the facts that hold after a pass, from those that held before it."""
    return frozenset(map(str, facts | pass_.provided()))


def _verify_provided(pass_: Pass, rw: Rewriter) -> None:
    skipped = {skip.node for skip in rw.record.skips}
    for fact in sorted(pass_.provided()):
        with roles_remembered(rw.graph):
            reason = fact.check(rw.program, lambda node: node.name not in skipped and pass_.selects(node))
        if reason is not None:
            raise FactError(f"pass {pass_.name!r} promises {fact!r}, but {reason}")
