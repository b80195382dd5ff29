"""The table of results that ``mxfx run`` prints: one row a configuration, as in the tutorial's recap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from pathlib import Path

    from mxfx.evaluation.compare import Difference
    from mxfx.evaluation.results import EvalResult, Ratio


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


def evaluated_note(first: EvalResult | None, notes: Sequence[str]) -> str:
    """What stands below the table of results: the text that was read, and what the models say of themselves."""
    if first is None:
        return "no text was evaluated: give --eval wikitext, files, or chat"
    read = (
        f"{first.tokens:,} tokens of {first.source}; word ppl by lm-eval's wikitext metrics, "
        f"token ppl over windows of {first.max_length} tokens; ± is the standard error of the word ppl ratio"
    )
    return "\n".join([read, *notes[:1]])


@dataclass(frozen=True)
class DomainRow:
    """One domain of one configuration; divergence in nats, shares of tokens. None where there is no float model."""

    name: str
    domain: str
    tokens: int
    token_perplexity: float
    ratio: float | None = None
    ratio_stderr: float | None = None
    kl: float | None = None
    kl_stderr: float | None = None
    median: float | None = None
    p90: float | None = None
    p99: float | None = None
    p999: float | None = None
    agreement: float | None = None
    agreement_stderr: float | None = None

    @classmethod
    def of(cls, name: str, result: EvalResult, ratio: Ratio | None) -> DomainRow:
        row: dict[str, Any] = {} if ratio is None else {"ratio": ratio.ratio, "ratio_stderr": ratio.stderr}
        found = result.divergence
        if found is not None:
            row |= {"kl": found.mean, "kl_stderr": found.stderr, "agreement": found.agreement}
            row |= {"agreement_stderr": found.agreement_stderr}
            row |= {name: getattr(found, name) for name in ("median", "p90", "p99", "p999")}
        return cls(name, result.task, result.tokens, result.token_perplexity, **row)


def domain_tables(
    domains: Sequence[DomainRow], tasks: Sequence[tuple[str, str, str, float, float | None]]
) -> list[Table]:
    """The tables of domains and of tasks; none for what was not evaluated."""
    return [*([domains_table(domains)] if domains else []), *([tasks_table(tasks)] if tasks else [])]


def domains_table(rows: Sequence[DomainRow]) -> Table:
    """Every domain with every configuration below it: what a single perplexity does not show.

    A domain is a line of its own: beside eight figures, 120 columns have no room for a column of it.
    """
    note = "KL of the next token from the float model, in nats; ± is a standard error over windows"
    table = Table(title="Domains", caption=note, caption_justify="left", title_justify="left")
    table.add_column("domain: tokens", overflow="fold", min_width=12)
    for heading in ("token ppl", "× float", "KL", "median", "90 %", "99 %", "99.9 %", "agreement"):
        table.add_column(heading, justify="right")
    for domain in dict.fromkeys(row.domain for row in rows):
        of_domain = [row for row in rows if row.domain == domain]
        table.add_row(f"{domain}: {of_domain[0].tokens:,}")
        for row in of_domain:
            table.add_row(
                f"  {row.name}",
                _number(row.token_perplexity, ".3f"),
                _with_error(row.ratio, row.ratio_stderr),
                _with_error(row.kl, row.kl_stderr),
                *(_number(value, ".3f") for value in (row.median, row.p90, row.p99, row.p999)),
                _with_error(row.agreement, row.agreement_stderr),
            )
        table.add_section()
    return table


def card_table(rows: Sequence[DomainRow], bits_per_weight: float) -> str:
    """A model's domains in Markdown, for its card."""
    heads = ("domain", "tokens", "token ppl", "× float", "KL nats", "agreement", "bits/weight")
    lines = [heads, ("---", *["---:"] * (len(heads) - 1))]
    for row in rows:
        lines.append(
            (
                row.domain.replace("|", "\\|"),
                f"{row.tokens:,}",
                _number(row.token_perplexity, ".3f"),
                _with_error(row.ratio, row.ratio_stderr, ".4f"),
                _with_error(row.kl, row.kl_stderr, ".4f"),
                _with_error(row.agreement, row.agreement_stderr, ".4f"),
                _number(bits_per_weight, ".2f"),
            )
        )
    note = "Against the float model, on the next token; ± is a standard error over windows."
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", note])


def tasks_table(rows: Sequence[tuple[str, str, str, float, float | None]]) -> Table:
    """Tasks of lm-eval: configuration, task, metric, value, standard error."""
    table = Table(title="Tasks", title_justify="left")
    for heading in ("task", "metric", "config"):
        table.add_column(heading, overflow="fold")
    table.add_column("value", justify="right", no_wrap=True)
    for name, task, metric, value, error in sorted(rows, key=lambda row: row[1:3]):
        table.add_row(task, metric, name, _with_error(value, error))
    return table


def differences_table(found: Sequence[Difference], floor: float, a: Path, b: Path) -> Table:
    """What `compare` found in the folders `a` and `b`."""
    note = (
        f"± is the standard error of the paired difference; noise beside it: {floor:.1%} from seed to seed. "
        "p is McNemar's, of the text alone"
    )
    table = Table(title=Text(f"A: {a}, B: {b}"), caption=note, caption_justify="left", title_justify="left")
    for heading in ("domain", "figure"):
        table.add_column(heading, overflow="fold")
    for heading in ("A", "B", "B − A", "p"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for row in found:
        log = " (log)" if row.what == "perplexity" else ""
        table.add_row(
            row.domain,
            row.what,
            _number(row.a, ".4f"),
            _number(row.b, ".4f"),
            _with_error(row.difference, row.stderr, "+.4f") + log,
            _number(row.p, ".2g"),
            row.verdict,
        )
    return table


def _with_error(value: float | None, error: float | None, form: str = ".3f") -> str:
    shown = _number(value, form)
    return shown if value is None or error is None else f"{shown} ± {error:{form.lstrip('+')}}"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
