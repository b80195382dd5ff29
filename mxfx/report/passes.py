"""What each pass did in a run."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from mxfx.pipeline.manager import PASSES, PipelineResult
from mxfx.report.linears import linear_lines, linears_of
from mxfx.report.memory import memory
from mxfx.rewrite import Skip


def pass_table(result: PipelineResult, title: str) -> Table:
    """One row a pass of a run: matches, skips, time, whether its promise held, and what a lossy pass costs."""
    note = "KL and SQNR of the logits against the float model, on the run's probe tokens, after each lossy pass"
    table = Table(title=title, caption=note, title_justify="left", caption_justify="left")
    table.add_column("#", justify="right")
    table.add_column("pass", no_wrap=True)
    for heading in ("matched", "skipped", "seconds"):
        table.add_column(heading, justify="right")
    table.add_column("promise")
    for heading in ("KL nats", "SQNR dB"):
        table.add_column(heading, justify="right")
    for step in result.steps:
        timing = step.findings.get("timing")
        seconds = timing.get("seconds") if isinstance(timing, Mapping) else None
        table.add_row(
            str(step.index),
            step.called,
            str(len(step.record.matches)),
            str(len(step.record.skips)),
            f"{seconds:.2f}" if isinstance(seconds, int | float) else "–",
            Text(promise(step.findings)),
            *lost(step.findings),
        )
    return table


def promise(findings: Mapping[str, object]) -> str:
    """What a pass promised and how it was held: ``close, error 3.1e-15``; ``exact``; ``lossy``."""
    found = findings.get("numerics")
    if not isinstance(found, Mapping):
        return "unchecked"
    name = str(found["promise"])
    if "unchecked" in found:
        return f"{name}, unchecked: {found['unchecked']}"
    error = found.get("error")
    flipped = f", {found['flipped']} of {found['codes']} codes flipped" if found.get("codes") else ""
    return name + (f", error {error:.2g}" if isinstance(error, float) and name != "exact" else "") + flipped


def lost(findings: Mapping[str, object]) -> tuple[str, str]:
    """KL in nats and SQNR in dB against the float program after a lossy pass; ``–`` for any other."""
    ledger = findings.get("ledger")
    if not isinstance(ledger, Mapping) or "kl" not in ledger:
        return "–", "–"
    sqnr = ledger["sqnr"]
    # JSON has no NaN: a divergence that is none is null in a file.
    kl = math.nan if ledger["kl"] is None else ledger["kl"]
    return f"{kl:.3g}", "∞" if sqnr is None else sqnr if isinstance(sqnr, str) else f"{sqnr:.1f}"


def account_lines(result: PipelineResult) -> Iterator[str]:
    """For each pass: what it matched, what instruments found, and each reason for skips, the nearest miss first; then
    how linears run, and what the device holds.
    """
    for step in result.steps:
        record = step.record
        yield f"{step.index} {step.called}: {len(record.matches)} matched, {len(record.skips)} skipped"
        for name, found in step.findings.items():
            if isinstance(found, Mapping):
                yield f"    {name}: {_flat(found)}"
        for key, value in record.details.items():
            if key == "providers":
                yield from _provider_lines(value)
            else:
                yield f"    {key}: {_short(value)}"
        yield from _skip_lines(record.skips)
    yield from linear_lines(linears_of(result.program, result.steps))
    yield f"on the device: {memory(result.program)}"
    yield _instrument_line(result)


def _instrument_line(result: PipelineResult) -> str:
    found = {name: spent.processor_seconds for name, spent in result.time.items()}
    passes = found.pop(PASSES, 0.0)
    each = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in found.items() if seconds >= 0.005)
    share = f", {sum(found.values()) / passes:.0%} of the passes' {passes:.2f} s" if passes else ""
    return f"instruments, of processor time: {each or 'none'}{share}"


def _provider_lines(rows: Any) -> Iterator[str]:
    """What computes each op, from the rows of ``record.details["providers"]``: a kernel, or its definition and why."""
    alike = Counter((row["op"], row["provider"] or f"its definition: {row['reason']}") for row in rows)
    for (op, by), count in alike.items():
        yield f"    {op} of {count} nodes by {by}"


def _skip_lines(skips: Sequence[Skip]) -> Iterator[str]:
    nearest = max((skip for skip in skips if skip.depth > 0), key=lambda skip: skip.depth, default=None)
    if nearest is not None:
        place = f"{nearest.node} ({nearest.path or 'top level'})"
        yield f"    best partial match, {nearest.depth} deep: {place}: {nearest.reason}"
    alike: dict[tuple[str, str], list[Skip]] = {}
    for skip in sorted(skips, key=lambda s: -s.depth):
        alike.setdefault((skip.rule, skip.reason), []).append(skip)
    for (rule, reason), group in alike.items():
        places = ", ".join(skip.path or skip.node for skip in group[:3])
        more = f" and {len(group) - 3} more" if len(group) > 3 else ""
        yield f"    skipped {places}{more}: {f'{rule}: ' if rule else ''}{reason}"


def _flat(found: Mapping[str, object]) -> str:
    """Scalars in full; tables (one figure a layer) by their smallest entry."""
    parts = []
    for key, value in found.items():
        if isinstance(value, Mapping):
            numbers = {k: v for k, v in value.items() if isinstance(v, int | float)}
            if numbers:
                least = min(numbers, key=numbers.__getitem__)
                parts.append(f"{key} lowest {numbers[least]:.3g} ({least})")
        else:
            parts.append(f"{key} {_short(value)}")
    return ", ".join(parts)


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)[:200]
