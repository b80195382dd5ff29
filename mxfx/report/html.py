"""``report.html``: one self-contained page for a run directory. No script, no font, no picture from anywhere else."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from mxfx.report.details import decisions
from mxfx.report.domains import domain_panels
from mxfx.report.passes import lost, promise
from mxfx.report.style import CSS

#: Order of the heat map's rows; what is not named here comes after.
_OPERANDS = (
    "q_proj", "k_proj", "v_proj", "qkv_proj", "attention", "o_proj",
    "gate_proj", "up_proj", "gate_up_proj", "down_proj", "residual",
)  # fmt: skip


def page(folder: Path) -> str:
    """The page of a run directory, from its ``results.json`` and the regions that its dumps kept.

    Raises ``OSError`` or ``ValueError`` for a folder without readable results.
    """
    document = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    configs = document["configs"]
    run = [config for config in configs if config["file"]]
    title = "mxfx: " + ", ".join(config["name"] for config in run)
    parts = [f"<h1>{escape(title)}</h1>", _about(document), _results(configs), domain_panels(configs)]
    parts += [_config(config, folder / config["name"]) for config in run]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<title>{escape(title)}</title>\n<style>{CSS}</style>\n'
        "</head>\n<body>\n<main>\n" + "\n".join(parts) + "\n</main>\n</body>\n</html>\n"
    )


def _about(document: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in document["versions"].items())
    machine = document["machine"]
    lines = [
        f"mxfx {document['mxfx']}, {versions}; {machine['device']}, {machine['cores']} cores, {machine['platform']}"
    ]
    lines += sorted({config["model_note"] for config in document["configs"] if config["model_note"]})
    return "".join(f'<p class="soft">{escape(line)}</p>' for line in lines)


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


def _results(configs: Sequence[Mapping[str, Any]]) -> str:
    shown = [f for f in _FIGURES if any(config["figures"].get(f[1]) is not None for config in configs)]
    rows = [
        [_cell(_link(config), "name"), *(_number(config["figures"].get(key), form) for _, key, form in shown)]
        for config in configs
    ]
    heads = [_head("config"), *(_head(name, numeric=True) for name, _, _ in shown)]
    evaluated = next((config["evaluation"]["domains"] for config in configs if config["evaluation"]), None)
    first = None if evaluated is None else next(iter(evaluated.values()), None)
    note = "No text was evaluated." if first is None else _evaluated(first)
    return f'<h3>Results</h3>{_table("results", heads, rows)}<p class="soft">{escape(note)}</p>'


def _link(config: Mapping[str, Any]) -> str:
    name = escape(config["name"])
    return name if not config["file"] else f'<a href="#{name}">{name}</a>'


def _evaluated(evaluation: Mapping[str, Any]) -> str:
    tokens, source = evaluation.get("tokens"), evaluation.get("source")
    about = f"{tokens:,} tokens of {source}; " if isinstance(tokens, int) else ""
    return (
        about
        + "word perplexity by lm-eval's wikitext metrics; ± is the standard error of its ratio to the float model."
    )


def _config(config: Mapping[str, Any], folder: Path) -> str:
    name = escape(config["name"])
    parts = [f'<section id="{name}"><h2>{name}</h2><p class="soft path">{escape(config["file"])}</p>']
    parts += [_pipeline(config["passes"]), _warnings(config["passes"]), _heat_maps(config["passes"])]
    parts += [
        _coverage(config.get("coverage")),
        decisions(config["passes"]),
        _regions(config["passes"], folder),
        "</section>",
    ]
    return "\n".join(parts)


def _pipeline(passes: Sequence[Mapping[str, Any]]) -> str:
    seconds = [_seconds(step) for step in passes]
    longest = max((s for s in seconds if s is not None), default=0.0) or 1.0
    rows = []
    for index, (step, took) in enumerate(zip(passes, seconds, strict=True), start=1):
        kl, sqnr = lost(step["findings"])
        rows.append(
            [
                _cell(str(index), "n"),
                _cell(escape(step["pass"]), "name"),
                _cell(str(step["matched"]), "n"),
                _skips(step),
                _bar(took, longest),
                _promise(step["findings"]),
                _cell(kl, "n"),
                _cell(sqnr, "n"),
                _cell(escape(_short_place(step["place"])), "path"),
            ]
        )
    heads = [_head("#", numeric=True), _head("pass")]
    heads += [_head(h, numeric=True) for h in ("matched", "skipped", "seconds")] + [_head("promise")]
    heads += [_head(h, numeric=True) for h in ("KL nats", "SQNR dB")] + [_head("from")]
    note = "KL and SQNR of the logits against the float model, on the run's probe tokens, after each lossy pass."
    return f'<h3>Pipeline</h3>{_table("pipeline", heads, rows)}<p class="soft">{note}</p>'


def _promise(findings: Mapping[str, Any]) -> str:
    text = promise(findings)
    return _cell(escape(text), "brief" if len(text) < 30 else "why")


def _skips(step: Mapping[str, Any]) -> str:
    reasons = "; ".join(f"{r['count']} × {r['reason']}" for r in step.get("reasons", ()))
    title = f' title="{escape(reasons)}"' if reasons else ""
    return f'<td class="n"{title}>{step["skipped"]}</td>'


def _seconds(step: Mapping[str, Any]) -> float | None:
    timing = step["findings"].get("timing")
    return timing["seconds"] if isinstance(timing, Mapping) else None


def _bar(value: float | None, longest: float) -> str:
    if value is None:
        return _cell("–", "n")
    share = 100 * value / longest
    return (
        f'<td class="n bar" style="--share:{share:.0f}%">{value:.2f}</td>' if share >= 1 else _cell(f"{value:.2f}", "n")
    )


def _short_place(place: str | None) -> str:
    """``FILE:LINE`` of ``path/FILE:LINE:COLUMN``."""
    if not place:
        return "added"
    return Path(place).name.rsplit(":", 1)[0]


def _warnings(passes: Sequence[Mapping[str, Any]]) -> str:
    found = [f"{step['pass']}: {warning}" for step in passes for warning in step["warnings"]]
    if not found:
        return ""
    return "<h3>Warnings</h3><ul>" + "".join(f"<li>{escape(w)}</li>" for w in found) + "</ul>"


def _heat_maps(passes: Sequence[Mapping[str, Any]]) -> str:
    """SQNR by layer and operand after the last lossy pass; after those before it on request."""
    measured = [(step["pass"], step["findings"]["ledger"]) for step in passes if _is_measured(step)]
    if not measured:
        return '<h3>Where precision goes</h3><p class="soft">No lossy pass was measured.</p>'
    (last, entry), earlier = measured[-1], measured[:-1]
    folded = "".join(
        f"<details><summary>after {escape(name)}</summary>{_heat_map(found)}</details>" for name, found in earlier
    )
    note = f"SQNR in dB after <b>{escape(last)}</b>, of each operator's result against the float model's."
    return f'<h3>Where precision goes</h3><p class="soft">{note}</p>{_heat_map(entry)}{folded}'


def _is_measured(step: Mapping[str, Any]) -> bool:
    ledger = step["findings"].get("ledger")
    return isinstance(ledger, Mapping) and bool(ledger.get("operands") or ledger.get("layers"))


def _heat_map(ledger: Mapping[str, Any]) -> str:
    cells: dict[str, dict[int, float | None]] = {}
    for name, db in ledger["operands"].items():
        layer, _, operand = name.partition("/")
        cells.setdefault(operand, {})[int(layer)] = db
    for layer, db in ledger["layers"].items():
        cells.setdefault("residual", {})[int(layer)] = db
    layers = 1 + max(layer for row in cells.values() for layer in row)
    known = [db for row in cells.values() for db in row.values() if db is not None]
    low, high = min(known, default=0.0), max(known, default=1.0)
    body = "<span>layer</span>" + "".join(f"<b>{layer if layer % 5 == 0 else ''}</b>" for layer in range(layers))
    for operand in sorted(cells, key=_row_order):
        body += f"<span>{escape(operand)}</span>"
        body += "".join(_heat(cells[operand], operand, layer, low, high) for layer in range(layers))
    scale = f'<div class="scale">{low:.1f} dB<i></i>{high:.1f} dB</div>'
    return f'<div class="wide"><div class="heat" style="--layers:{layers}">{body}</div>{scale}</div>'


def _row_order(operand: str) -> tuple[int, str]:
    return (_OPERANDS.index(operand) if operand in _OPERANDS else len(_OPERANDS), operand)


def _heat(row: Mapping[int, float | None], operand: str, layer: int, low: float, high: float) -> str:
    where = f"layer {layer}, {escape(operand)}"
    if layer not in row:
        return f'<i class="none" title="{where}: not comparable (another basis or shape)"></i>'
    db = row[layer]
    if db is None:
        return f'<i style="--v:1" title="{where}: equal"></i>'
    share = (db - low) / max(high - low, 1e-9)
    return f'<i style="--v:{share:.3f}" title="{where}: {db:.1f} dB">{db:.0f}</i>'


def _coverage(report: Mapping[str, Any] | None) -> str:
    if report is None:
        return '<h3>Coverage</h3><p class="soft">The pipeline lowers the program: its operands are gone.</p>'
    formatted = [row for row in report["operands"] if row["format"]]
    plain = [row for row in report["operands"] if not row["format"]]
    bits = f"{report['bits_per_weight']:.3f} bits per weight over {report['parameters']:,} parameters; "
    bits += "× counts layers that are alike."
    return (
        f'<h3>Coverage</h3><p class="soft">{bits}</p>'
        + _table("products", _heads("product", "×n", "4-bit executable", "why"), map(_product, report["products"]))
        + _table(
            "multiplied",
            _heads("weights multiplied by", "×n", "elements", "on a grid"),
            map(_multiplied, report.get("multiplied", [])),
        )
        + f"<details open><summary>Operands in a format <span class='soft'>{len(formatted)} kinds</span></summary>"
        + _table("operands", _heads("operand", "×n", "format", "state", "set by"), map(_operand, formatted))
        + f"</details><details><summary>Operands left in float <span class='soft'>{len(plain)} kinds</span></summary>"
        + _table("float-operands", _heads("operand", "×n", "why not"), map(_float_operand, plain))
        + "</details>"
    )


def _multiplied(row: Mapping[str, Any]) -> list[str]:
    return [
        _cell(escape(row["role"]), "path"),
        _cell(f"{row['count']}", "n"),
        _cell(f"{row['elements']:,}", "n"),
        _cell(f"{row['rounded'] / max(row['elements'], 1):.1%}", "n"),
    ]


def _product(row: Mapping[str, Any]) -> list[str]:
    verdict = '<span class="tag yes">yes</span>' if row["four_bit"] else '<span class="tag no">no</span>'
    return [
        _cell(escape(row["path"]), "path"),
        _cell(f"{row['count']}", "n"),
        _cell(verdict),
        _cell(escape(row["reason"]), "why"),
    ]


def _operand(row: Mapping[str, Any]) -> list[str]:
    return [
        _cell(_operand_name(row), "path"),
        _cell(f"{row['count']}", "n"),
        _cell(f"<code>{escape(row['format'])}</code>"),
        _cell(escape(row["state"])),
        _cell(escape(row["by"]), "why"),
    ]


def _float_operand(row: Mapping[str, Any]) -> list[str]:
    return [_cell(_operand_name(row), "path"), _cell(f"{row['count']}", "n"), _cell(escape(row["reason"]), "why")]


def _operand_name(row: Mapping[str, Any]) -> str:
    return escape(f"{row['path']} · {row['kind']} {row['operand']}")


def _regions(passes: Sequence[Mapping[str, Any]], folder: Path) -> str:
    found = []
    for index, step in enumerate(passes, start=1):
        path = folder / "ir" / f"{index:03d}_{step['pass']}" / "diff.txt"
        if not path.is_file():
            continue
        lines = path.read_text(encoding="utf-8").splitlines()
        regions = sum(line.startswith("@@") for line in lines)
        kinds = "1 kind of edit" if regions == 1 else f"{regions} kinds of edit"
        name = f"{index} {escape(step['pass'])} <span class='soft'>{kinds}</span>"
        text = "".join(_diff_line(line) for line in lines)
        found.append(
            f'<details class="diff"><summary>{name}</summary><div class="wide"><pre>{text}</pre></div></details>'
        )
    if not found:
        return '<h3>Edited regions</h3><p class="soft">No pass changed the graph, or its dump is gone.</p>'
    note = "Each kind of edit once; layers edited alike are named below it."
    return f'<h3>Edited regions</h3><p class="soft">{note}</p>{"".join(found)}'


_LINE = {"+": "add", "-": "cut", "~": "reads", "@": "place"}


def _diff_line(line: str) -> str:
    of = _LINE.get(line[:1], "")
    return f'<span class="{of}">{escape(line)}</span>' if of else f"<span>{escape(line)}</span>"


def _table(name: str, heads: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return (
        f'<div class="wide"><table class="{name}"><thead><tr>{"".join(heads)}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _heads(*names: str) -> list[str]:
    return [_head(name.removeprefix("×n") or "×", numeric=name == "×n") for name in names]


def _head(name: str, numeric: bool = False) -> str:
    return f'<th class="n">{escape(name)}</th>' if numeric else f"<th>{escape(name)}</th>"


def _cell(content: str, of: str = "") -> str:
    return f'<td class="{of}">{content}</td>' if of else f"<td>{content}</td>"


def _number(value: float | None, form: str) -> str:
    return _cell("–" if value is None else format(value, form), "n")
