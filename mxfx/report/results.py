"""The figures of a run as JSON: what ``results.json`` says of each pass, and what the page is made from."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from mxfx.graph.program import Program
from mxfx.ground.clock import Spent
from mxfx.pipeline.manager import PASSES, PipelineResult, StepResult
from mxfx.report.coverage import Coverage, coverage
from mxfx.rewrite import Skip

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def pass_json(step: StepResult) -> dict[str, object]:
    """One pass: matches, skips by reason, warnings, findings of instruments."""
    return {
        "pass": step.pass_.name,
        **({"phase": step.phase} if step.phase else {}),
        "place": step.place,
        "matched": len(step.record.matches),
        "skipped": len(step.record.skips),
        "reasons": [{"reason": reason, "count": count} for reason, count in _reasons(step.record.skips)],
        "warnings": step.record.warnings,
        "details": step.record.details,
        "findings": step.findings,
    }


def instruments_json(result: PipelineResult) -> dict[str, object]:
    """What stands around the passes took, each instrument and as a part of the passes' processor time."""
    each = {name: vars(spent) for name, spent in result.time.items() if name != PASSES}
    passes = result.time.get(PASSES, Spent())
    whole = sum(spent["processor_seconds"] for spent in each.values())
    share = whole / passes.processor_seconds if passes.processor_seconds else None
    return {PASSES: vars(passes), "instruments": each, "share_of_passes": share}


def coverage_json(result: PipelineResult) -> dict[str, object] | None:
    """Coverage of a run's program before its emit stage, alike layers in one row; None if it was lowered already."""
    if "lowered" in result.before_emit.facts:
        return None
    records = [step.record for step in result.steps if step.phase != "decode" or result.program.phases is None]
    return fold(coverage(result.before_emit, records), result.before_emit)


def fold(report: Coverage, program: Program) -> dict[str, object]:
    """Rows that say the same of every layer become one row whose path has ``*`` for the layer, with their count."""
    rows = Counter(
        (_NUMBER.sub("*", r.path) or r.node, r.kind, r.operand, r.format, r.by, r.state, r.reason) for r in report.rows
    )
    gemms = Counter((_NUMBER.sub("*", g.path) or g.node, g.four_bit, g.reason) for g in report.gemms)
    keys = ("path", "kind", "operand", "format", "by", "state", "reason")
    return {
        "operands": [{**dict(zip(keys, row, strict=True)), "count": count} for row, count in rows.items()],
        "products": [
            {"path": path, "four_bit": four, "reason": why, "count": n} for (path, four, why), n in gemms.items()
        ],
        "multiplied": [vars(share) for share in report.roles],
        "bits_per_weight": report.weight_bits,
        "parameters": report.parameters,
        "layers": program.layers,
    }


def _reasons(skips: Sequence[Skip]) -> list[tuple[str, int]]:
    return Counter(skip.reason for skip in skips).most_common()
