"""What a pass is made of: the contract, the rewriter, selectors, facts, and ``apply``."""

from mxfx.rewrite.apply import Applied, apply, check_facts_before, facts_after
from mxfx.rewrite.context import Context, MissingCalibration
from mxfx.rewrite.facts import Fact, FactError, all_facts, find_fact
from mxfx.rewrite.numerics import Close, Exact, Local, Lossy, Numerics
from mxfx.rewrite.pass_ import NodePass, Pass, UnknownPass, all_passes, find_pass, load_plugins, register
from mxfx.rewrite.record import ExpectationError, Match, PassRecord, Skip
from mxfx.rewrite.rewriter import Rewriter
from mxfx.rewrite.selector import ALL, Selector

__all__ = [
    "ALL",
    "Applied",
    "Close",
    "Context",
    "Exact",
    "ExpectationError",
    "Fact",
    "FactError",
    "Local",
    "Lossy",
    "Match",
    "MissingCalibration",
    "NodePass",
    "Numerics",
    "Pass",
    "PassRecord",
    "Rewriter",
    "Selector",
    "Skip",
    "UnknownPass",
    "all_facts",
    "all_passes",
    "apply",
    "check_facts_before",
    "facts_after",
    "find_fact",
    "find_pass",
    "load_plugins",
    "register",
]
