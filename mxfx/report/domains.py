"""Panels of the report's page, one a domain: figures, the divergence's distribution, the worst places as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from mxfx.report.render import render


def domain_panels(configs: Sequence[Mapping[str, Any]]) -> Markup:
    """One panel for each domain that any configuration was evaluated on; nothing without any."""
    found = {config["name"]: config["evaluation"]["domains"] for config in configs if config["evaluation"]}
    names = dict.fromkeys(domain for domains in found.values() for domain in domains)
    panels = {name: {config: of[name] for config, of in found.items() if name in of} for name in names}
    ratios = {config["name"]: config.get("ratios", {}) for config in configs}
    tasks = [
        (task, metric, config["name"], value, of["stderr"].get(metric))
        for config in configs
        for task, of in (config["evaluation"] or {}).get("tasks", {}).items()
        for metric, value in of["metrics"].items()
    ]
    return render("domains.html", panels=panels, ratios=ratios, tasks=sorted(tasks, key=lambda row: row[:3]))
