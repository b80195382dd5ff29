"""Passes that were asked for and did nothing: a warning each, with the reason."""

from __future__ import annotations

from mxfx.config.emit import EMIT_PASSES
from mxfx.config.pipeline import RAISE_PASSES
from mxfx.graph.program import Program
from mxfx.rewrite import ALL, Pass, PassRecord

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
