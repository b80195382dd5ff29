"""The terminal's tables."""

from __future__ import annotations

from rich.console import Console

from mxfx.report.table import DomainRow, domains_table


def test_a_pipes_width_shows_every_figure_of_a_domain_whole() -> None:
    """A pipe is taken for 120 columns wide (``mxfx.cli.evaluate.out``)."""
    figures = {"kl": 0.2345, "kl_stderr": 0.0021, "median": 0.0912, "p90": 0.512, "p99": 1.812, "p999": 10.512}
    figures |= {"ratio": 1.186, "ratio_stderr": 0.004, "agreement": 0.7891, "agreement_stderr": 0.0031}
    console = Console(width=120, record=True)
    console.print(domains_table([DomainRow("best_w4a4kv4 decode", "encyclopedia", 103_456, 1719.123, **figures)]))
    head, _, domain, row = (line.strip("│┃┡┩ ") for line in console.export_text().splitlines()[2:6])
    assert [part.strip() for part in head.split("┃")][3:8] == ["KL", "median", "90 %", "99 %", "99.9 %"]
    assert domain.split("│")[0].strip() == "encyclopedia: 103,456"
    assert [part.strip() for part in row.split("│")] == [
        "best_w4a4kv4 decode", "1719.123", "1.186 ± 0.004", "0.234 ± 0.002",
        "0.091", "0.512", "1.812", "10.512", "0.789 ± 0.003",
    ]  # fmt: skip
