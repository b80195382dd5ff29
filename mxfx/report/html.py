"""``report.html``: one self-contained page for a run directory. No script, no font, no picture from anywhere else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import UndefinedError

from mxfx.ground.files import read_json, read_text
from mxfx.ops.kernels.ways import said
from mxfx.report.details import decisions
from mxfx.report.domains import domain_panels
from mxfx.report.passes import lost, promise
from mxfx.report.render import called, render

#: Order of the heat map's rows; what is not named here comes after.
_OPERANDS = (
    "q_proj", "k_proj", "v_proj", "qkv_proj", "attention", "o_proj",
    "gate_proj", "up_proj", "gate_up_proj", "down_proj", "residual",
)  # fmt: skip
_FIGURES = (
    ("word ppl", "word_perplexity", ".3f"),
    ("× float", "ratio", ".3f"),
    ("± se", "ratio_stderr", ".3f"),
    ("token ppl", "token_perplexity", ".3f"),
    ("× float", "token_ratio", ".3f"),
    ("bits/weight", "bits_per_weight", ".2f"),
    ("compile s", "compile_seconds", ".1f"),
    ("eval s", "eval_seconds", ".1f"),
)
_LINE = {"+": "add", "-": "cut", "~": "reads", "@": "place"}


def page(folder: Path) -> str:
    """The page of a run directory, from its ``results.json`` and the regions that its dumps kept.

    Raises ``OSError`` or ``ValueError`` for a folder without readable results.
    """
    document = read_json(folder / "results.json")
    configs = document["configs"]
    figures = [f for f in _FIGURES if any(config["figures"].get(f[1]) is not None for config in configs)]
    try:
        made = render(
            "page.html",
            title="mxfx: " + ", ".join(config["name"] for config in configs if config["file"]),
            about=_about(document),
            configs=configs,
            figures=figures,
            heads=["config", *(f"#{name}" for name, _, _ in figures)],
            evaluated=_evaluated(configs),
            domains=domain_panels(configs),
            pipeline=_pipeline,
            heat_maps=_heat_maps,
            decisions=decisions,
            ways=lambda rows: "; ".join(said([(way["rows"], way["how"]) for way in rows])),
            regions=lambda config: _regions(config["passes"], folder / Path(config["name"]).name),
        )
    except UndefinedError as error:
        raise ValueError(str(error)) from error
    return str(made)


def _about(document: Mapping[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {number}" for name, number in document["versions"].items())
    machine = document["machine"]
    made = f"mxfx {document['mxfx']}, {versions}; {machine['device']}, {machine['cores']} cores, {machine['platform']}"
    again = [
        f"{config['name']}, {text}: measured again on {on['device']} with mxfx {on['mxfx']}, torch {on['torch']}"
        for config in document["configs"]
        for text, on in config.get("evaluated_again", {}).items()
    ]
    return [made, *sorted({config["model_note"] for config in document["configs"] if config["model_note"]}), *again]


def _evaluated(configs: Sequence[Mapping[str, Any]]) -> str:
    evaluated = next((config["evaluation"]["domains"] for config in configs if config["evaluation"]), None)
    first = next(iter((evaluated or {}).values()), None)
    if first is None:
        return "No text was evaluated."
    tokens, source = first.get("tokens"), first.get("source")
    about = f"{tokens:,} tokens of {source}; " if isinstance(tokens, int) else ""
    measured = "word perplexity by lm-eval's wikitext metrics; ± is the standard error of its ratio to the float model."
    return about + measured


def _pipeline(passes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the table of passes shows of each, beside the step itself; ``share`` is of the longest pass, in percent."""
    seconds = [_seconds(step) for step in passes]
    longest = max((s for s in seconds if s is not None), default=0.0) or 1.0
    return [
        {
            "step": step,
            "reasons": "; ".join(f"{r['count']} × {r['reason']}" for r in step.get("reasons", ())),
            "seconds": took,
            "share": 100 * (took or 0.0) / longest,
            "promise": promise(step["findings"]),
            "lost": lost(step["findings"]),
            # FILE:LINE of path/FILE:LINE:COLUMN
            "place": Path(step["place"]).name.rsplit(":", 1)[0] if step["place"] else "added",
        }
        for step, took in zip(passes, seconds, strict=True)
    ]


def _seconds(step: Mapping[str, Any]) -> float | None:
    timing = step["findings"].get("timing")
    return timing["seconds"] if isinstance(timing, Mapping) else None


def _heat_maps(passes: Sequence[Mapping[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """SQNR by layer and operand after every lossy pass, the last one first."""
    measured = [(called(step), _heat_map(step["findings"]["ledger"])) for step in passes if _is_measured(step)]
    return measured[-1:] + measured[:-1]


def _is_measured(step: Mapping[str, Any]) -> bool:
    ledger = step["findings"].get("ledger")
    return isinstance(ledger, Mapping) and bool(ledger.get("operands") or ledger.get("layers"))


def _heat_map(ledger: Mapping[str, Any]) -> dict[str, Any]:
    rows: dict[str, dict[int, float | str | None]] = {}
    for name, db in ledger["operands"].items():
        layer, _, operand = name.partition("/")
        rows.setdefault(operand, {})[int(layer)] = db
    for layer, db in ledger["layers"].items():
        rows.setdefault("residual", {})[int(layer)] = db
    layers = 1 + max(layer for row in rows.values() for layer in row)
    known = [db for row in rows.values() for db in row.values() if isinstance(db, int | float)]
    low, high = min(known, default=0.0), max(known, default=1.0)
    cells = [(name, [_heat(rows[name], i, low, high) for i in range(layers)]) for name in sorted(rows, key=_row_order)]
    return {"layers": layers, "low": low, "high": high, "rows": cells}


def _row_order(operand: str) -> tuple[int, str]:
    return (_OPERANDS.index(operand) if operand in _OPERANDS else len(_OPERANDS), operand)


def _heat(row: Mapping[int, float | str | None], layer: int, low: float, high: float) -> tuple[str, str, str, str]:
    """A cell: its class, its place between the lowest and the highest, what it says, what it shows."""
    if layer not in row:
        return "none", "", "not comparable (another basis or shape)", ""
    db = row[layer]
    if db is None:
        return "", "1", "equal", ""
    if isinstance(db, str):
        return "none", "", db, "!"
    return "", f"{(db - low) / max(high - low, 1e-9):.3f}", f"{db:.1f} dB", f"{db:.0f}"


def _regions(passes: Sequence[Mapping[str, Any]], folder: Path) -> list[tuple[str, int, list[tuple[str, str]]]]:
    """For each pass that changed the graph: its name, how many kinds of edit, the lines of its diff and their class."""
    found = []
    for index, step in enumerate(passes, start=1):
        path = folder / "ir" / f"{index:03d}_{step['pass']}" / "diff.txt"
        if path.is_file() and path.resolve().is_relative_to(folder.parent.resolve()):
            lines = read_text(path).splitlines()
            kinds = sum(line.startswith("@@") for line in lines)
            found.append((f"{index} {called(step)}", kinds, [(_LINE.get(line[:1], ""), line) for line in lines]))
    return found
