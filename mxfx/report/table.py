"""The table of results that ``mxfx run`` prints: one row a configuration, as in the tutorial's recap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table


@dataclass(frozen=True)
class Row:
    """One configuration's figures. Perplexities are None where nothing was evaluated."""

    name: str
    word_perplexity: float | None = None
    ratio: float | None = None
    ratio_stderr: float | None = None
    token_perplexity: float | None = None
    token_ratio: float | None = None
    bits_per_weight: float | None = None
    compile_seconds: float | None = None
    eval_seconds: float | None = None
    warnings: int = 0


def results_table(rows: Sequence[Row], title: str, note: str = "") -> Table:
    """A rich table; ``note`` stands below it (what the float model is, how much text was read)."""
    table = Table(title=title, caption=note or None, caption_justify="left", title_justify="left")
    table.add_column("config", overflow="fold")
    warned = any(row.warnings for row in rows)
    for heading in ("word ppl", "× float", "± se", "token ppl", "× float", "bits/weight", "compile s", "eval s"):
        table.add_column(heading, justify="right", no_wrap=True)
    if warned:
        table.add_column("warnings", justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.name,
            _number(row.word_perplexity, ".4f"),
            _number(row.ratio, ".3f"),
            _number(row.ratio_stderr, ".3f"),
            _number(row.token_perplexity, ".4f"),
            _number(row.token_ratio, ".3f"),
            _number(row.bits_per_weight, ".2f"),
            _number(row.compile_seconds, ".1f"),
            _number(row.eval_seconds, ".1f"),
            *((str(row.warnings) if row.warnings else "–",) if warned else ()),
        )
    return table


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
