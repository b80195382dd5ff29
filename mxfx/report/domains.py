"""Panels of the report's page, one a domain: figures, the divergence's distribution, the worst places as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

_FIGURES = (("mean", ".4f"), ("median", ".4f"), ("p90", ".3f"), ("p99", ".3f"), ("p999", ".3f"), ("agreement", ".4f"))
_HEADS = ("config", "token ppl", "KL mean", "median", "90 %", "99 %", "99.9 %", "agreement", "distribution of KL")
_ERRORS = {"mean": "stderr", "agreement": "agreement_stderr"}


def domain_panels(configs: Sequence[Mapping[str, Any]]) -> str:
    """One panel for each domain that any configuration was evaluated on; ``""`` without any."""
    found = {config["name"]: config["evaluation"]["domains"] for config in configs if config["evaluation"]}
    names = dict.fromkeys(domain for domains in found.values() for domain in domains)
    panels = "".join(_panel(name, {c: d[name] for c, d in found.items() if name in d}) for name in names)
    tasks = _tasks(configs)
    return f"<h2>Domains</h2>{panels}{tasks}" if panels or tasks else ""


def _panel(name: str, results: Mapping[str, Mapping[str, Any]]) -> str:
    first = next(iter(results.values()))
    about = f"{first['tokens']:,} tokens of {first['source']}, windows of up to {first['max_length']} tokens"
    head = "".join(f'<th class="{"n" if 0 < i < 8 else ""}">{text}</th>' for i, text in enumerate(_HEADS))
    rows = "".join(_row(config, result) for config, result in results.items())
    worst = "".join(_worst(config, result) for config, result in results.items())
    return (
        f'<h3>{escape(name)}</h3><p class="soft">{escape(about)}; KL of the next token from the float model in nats, '
        f'± its standard error over windows</p><div class="wide"><table class="domain"><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>{worst}"
    )


def _row(config: str, result: Mapping[str, Any]) -> str:
    divergence = result["divergence"]
    cells = [f'<td class="name">{escape(config)}</td><td class="n">{_shown(result["token_perplexity"], ".3f")}</td>']
    for key, form in _FIGURES:
        error = None if divergence is None else divergence.get(_ERRORS.get(key, ""))
        shown = "–" if divergence is None else _shown(divergence[key], form)
        cells.append(f'<td class="n">{shown}{"" if error is None else f" ± {error:{form}}"}</td>')
    cells.append(f"<td>{_histogram(divergence)}</td>")
    return f"<tr>{''.join(cells)}</tr>"


def _histogram(divergence: Mapping[str, Any] | None) -> str:
    """Bars over powers of ten, 12 pixels each; the text says what each holds."""
    if divergence is None:
        return "–"
    shares, edges = divergence["histogram"], divergence["edges"]
    highest = max(shares) or 1.0
    bars = []
    for index, share in enumerate(shares):
        height = 40 * share / highest
        says = f"{_shown(share, '.1%')} of tokens between {edges[index]:.2g} and {edges[index + 1]:.2g} nats"
        bars.append(
            f'<rect x="{12 * index}" y="{40 - height:.1f}" width="11" height="{height:.1f}" fill="var(--accent)">'
            f"<title>{says}</title></rect>"
        )
    label = f"KL per token, {edges[0]:.0e} to {edges[-1]:.0e} nats"
    size = f'width="{12 * len(shares)}" height="42"'
    return f'<svg {size} role="img" aria-label="{label}">{"".join(bars)}</svg>'


def _worst(config: str, result: Mapping[str, Any]) -> str:
    divergence = result["divergence"]
    if divergence is None or not divergence["worst"]:
        return ""
    rows = "".join(_place(place) for place in divergence["worst"])
    head = "".join(f"<th>{text}</th>" for text in ("KL", "text", "goes on", "float model", "this model"))
    return (
        f"<details><summary>{escape(config)}: where it is farthest from the float model</summary>"
        f'<div class="wide"><table class="worst"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
        "</details>"
    )


def _place(place: Mapping[str, Any]) -> str:
    def likeliest(pairs: Sequence[tuple[str, float]]) -> str:
        return "<br>".join(f"<code>{escape(repr(text))}</code> {_shown(share, '.0%')}" for text, share in pairs)

    return (
        f'<tr><td class="n">{_shown(place["kl"], ".2f")}</td><td class="path">{escape(place["text"])}</td>'
        f"<td><code>{escape(repr(place['next']))}</code></td>"
        f"<td>{likeliest(place['expected'])}</td><td>{likeliest(place['actual'])}</td></tr>"
    )


def _tasks(configs: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for config in configs:
        for task, found in (config["evaluation"] or {}).get("tasks", {}).items():
            for metric, value in found["metrics"].items():
                error = found["stderr"].get(metric)
                shown = _shown(value, ".4f") + ("" if error is None else f" ± {error:.4f}")
                cells = "".join(f"<td>{escape(text)}</td>" for text in (task, metric, config["name"]))
                rows.append(f'<tr>{cells}<td class="n">{shown}</td></tr>')
    if not rows:
        return ""
    head = '<th>task</th><th>metric</th><th>config</th><th class="n">value</th>'
    return (
        f'<h3>Tasks of lm-eval</h3><div class="wide"><table class="tasks"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(sorted(rows))}</tbody></table></div>"
    )


def _shown(value: float | None, form: str) -> str:
    """JSON has no NaN: a figure that is none is null in a file."""
    return "nan" if value is None else format(value, form)
