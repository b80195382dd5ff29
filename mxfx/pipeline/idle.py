"""Passes that were asked for and came to nothing: a warning each, with the reason."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from torch import fx

from mxfx.config.emit import EMIT_PASSES
from mxfx.config.pipeline import RAISE_PASSES
from mxfx.graph.program import Program
from mxfx.rewrite import ALL, Pass, PassRecord, all_passes
from mxfx.rewrite.facts import every_node
from mxfx.rewrite.roles import roles_remembered

#: How the warning begins.
DID_NOTHING = "did nothing: "


def is_idle(pass_: Pass, record: PassRecord) -> bool:
    """Whether a pass that somebody asked for did nothing, and there was something to do.

    Every pipeline begins and ends with passes that may be idle; so may one whose work a pass before it did.
    """
    asked_for = pass_.name not in RAISE_PASSES and pass_.name not in EMIT_PASSES
    done_before = any(skip.done for skip in record.skips)
    return asked_for and not record.matches and not record.changed and not record.limited and not done_before


def idle_warning(pass_: Pass, record: PassRecord, program: Program) -> str:
    """What is told of an idle pass, which was given ``program``."""
    if misses := getattr(pass_, "select", ALL).misses(program.graph.nodes):
        return DID_NOTHING + misses
    skip = max(record.skips, key=lambda one: one.depth, default=None)
    why = "nothing in this graph is of its kind" if skip is None else f"at {skip.path or skip.node}: {skip.reason}"
    return f"{DID_NOTHING}0 matched, {len(record.skips)} skipped ({why})"


def unmet(pass_: Pass, program: Program, behind: Sequence[Pass], *, ran: bool = True) -> Iterator[str]:
    """What a pass expects of those ``behind`` it and ``program`` lacks, in a line each.

    Of passes that have not ``ran`` yet it is what none of them selects.
    """
    with roles_remembered(program.graph):
        for fact in sorted(pass_.expects):
            takers = [one for one in behind if fact in one.provided()]
            reason = fact.check(program, every_node if ran else partial(_taken_by_none, takers))
            if reason is None:
                continue
            able = sorted(name for name, cls in all_passes().items() if fact in cls.provides)
            names = " and ".join(dict.fromkeys(one.name for one in takers))
            yield f"{reason}: " + (
                f"{names} behind it leaves that out, by its select or with a reason (mxfx run -v)"
                if takers
                else f"no pass behind it does that; add {' or '.join(able)}"
            )


def _taken_by_none(passes: Sequence[Pass], node: fx.Node) -> bool:
    return not any(one.selects(node) for one in passes)
