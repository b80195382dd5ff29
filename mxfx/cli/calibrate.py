"""Commands before a run: ``collect`` calibration sets, ``search`` rotations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mxfx.cli.evaluate import IncludePath, Trust

Model = Annotated[str | None, typer.Option("--model", help="Hub id or local folder; overrides the file's.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 …")]


def collect(
    source: Annotated[
        str,
        typer.Argument(
            help="hf:PATH[:CONFIG[:SPLIT[:COLUMNS]]], jsonl:FILE[:FIELDS], txt:FILE, lm_eval:TASK[:DOCUMENTS], or what "
            "calibration.dataset takes."
        ),
    ],
    model: Annotated[str, typer.Option("--model", help="Hub id or local folder: its tokenizer; lm_eval: runs it.")],
    out: Annotated[Path | None, typer.Option("--out", help="File to write, .pt.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Samples to write.")] = 32,
    length: Annotated[int, typer.Option(min=1, help="Tokens of each.")] = 1024,
    config: Annotated[
        Path | None, typer.Option("--config", help="File of the dialect whose token_collector says these.")
    ] = None,
    template: Annotated[
        str | None, typer.Option(help=r"Prompt of a row, columns in braces: 'Q: {question}\nA: {answer}'.")
    ] = None,
    max_prompts: Annotated[int | None, typer.Option(min=1, help="Prompts to take at most.")] = None,
    min_tokens: Annotated[int, typer.Option(min=1, help="Shorter prompts are left out.")] = 8,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
    include_path: IncludePath = None,
    dtype: Annotated[str, typer.Option(help="Precision of the model that lm_eval: runs.")] = "bfloat16",
    device: Device = "cpu",
    trust_remote_code: Trust = False,
) -> None:
    """Write a calibration set of a task's prompts: what `dataset = "FILE.pt"` and the dialect's "file:FILE.pt" read."""
    from mxfx.calibration.collector import TokenCollector
    from mxfx.compat.collector import collector_of_file
    from mxfx.config.errors import ConfigError, Place
    from mxfx.driver.collect import collect as run
    from mxfx.driver.options import check_device

    check_device(device)
    if (config is None) == (out is None):
        raise ConfigError(
            Place("mxfx collect"), "the file to write is not said, or twice", "--out FILE or --config FILE"
        )
    if config is not None:
        collector = collector_of_file(config)
    else:
        assert out is not None
        collector = TokenCollector(None, samples, length, out, overwrite, min_tokens)
    found = run(
        source,
        model,
        collector,
        template=None if template is None else template.replace(r"\n", "\n"),
        max_prompts=max_prompts,
        include_path=include_path,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    if found.samples < found.wanted:
        typer.echo(f"warning: {source} gives {found.samples} samples, {found.wanted} were asked for", err=True)
    of = "" if found.fed is None else f" of {found.fed} prompts"
    typer.echo(f"{found.samples} samples of {found.length} tokens{of} written to {found.file}")


def search(
    file: Annotated[Path, typer.Argument(help="Pipeline file, of mxfx or in the tutorial's dialect.")],
    model: Model = None,
    data: Annotated[
        str | None, typer.Option(help="Calibration data: wikitext2, c4, ptb, a local file, or a folder of .txt files.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="JSON file that keeps the decisions.")] = None,
    sites: Annotated[str | None, typer.Option(help="Types of matmul, between commas; all without.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Calibration samples to score on.")] = None,
    length: Annotated[int | None, typer.Option(min=2, help="Tokens of each.")] = None,
    improvement_eps: Annotated[
        float | None, typer.Option(help="Fall of the perplexity that a round must exceed.")
    ] = None,
    device: Device = "cpu",
    set_: Annotated[list[str], typer.Option("--set", help="Override, as in mxfx run.")] = [],  # noqa: B006
    trust_remote_code: Trust = False,
) -> None:
    """Search which kinds of matmul gain from an online rotation: a line a round, decisions in a file."""
    from mxfx.compat.prepare import prepare
    from mxfx.driver.options import RunOptions
    from mxfx.driver.search import search as run

    options = RunOptions(
        model=model,
        data=data,
        device=device,
        overrides=tuple(set_),
        trust_remote_code=trust_remote_code,
        say=lambda line: typer.echo(line, err=True),
    )
    options.check()
    ((_, pipeline),) = prepare([file], options)
    given: dict[str, object] = {
        "sites": None if sites is None else [site.strip() for site in sites.split(",")],
        "samples": samples,
        "length": length,
        "improvement_eps": improvement_eps,
        "cache_path": None if out is None else str(out),
    }
    found = run(pipeline, options, {key: value for key, value in given.items() if value is not None})
    for line in found.lines():
        typer.echo(line)
    for warning in found.warnings:
        typer.echo(f"warning: {warning}", err=True)
    if out is not None:
        typer.echo(f"kept in {out}: rotation-search reads it where cache_path names it")


COMMANDS = {"collect": collect, "search": search}
