"""Commands for emitted models: ``export``, ``import``, ``serve``; and ``doctor``, for where they run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Folder = Annotated[Path, typer.Argument(help="Emitted model: OUT, OUT/NAME or OUT/NAME/model.")]


def export(
    folder: Folder,
    to: Annotated[str, typer.Option("--to", help="hf, compressed-tensors, gguf or model-explorer.")],
    out: Annotated[Path, typer.Option("--out", help="New folder.")],
    bake: Annotated[
        bool,
        typer.Option("--bake", help="Multiply transforms at run time into the weights, which leave their grid."),
    ] = False,
) -> None:
    """Write an emitted model for another library, and prove it by reading it back with that library."""
    from mxfx.driver.run_directory import find_model
    from mxfx.export.artefact import load
    from mxfx.export.target import export as write
    from mxfx.report.saved import tokenizer_of

    saved = find_model(folder)
    written = write(load(saved), out, to, bake=bake, tokenizer=tokenizer_of(saved))
    for name, figure in written.checks.items():
        typer.echo(f"{name}: {figure:.1e}" if isinstance(figure, float) else f"{name}: {figure}")
    for note in written.notes:
        typer.echo(f"note: {note}", err=True)
    typer.echo(f"written to {written.folder}")


def import_(
    folder: Annotated[Path, typer.Argument(help="A compressed-tensors checkpoint in MXFP4, MXFP8 or NVFP4.")],
    out: Annotated[Path, typer.Option("--out", help="New folder for the emitted model.")],
    dtype: Annotated[
        str | None, typer.Option(help="Precision that the emitted model runs in; that of its config.json without.")
    ] = None,
) -> None:
    """Make an emitted model of a checkpoint that another tool quantized, to be evaluated with the same measures."""
    from mxfx.driver.imported import import_checkpoint

    for line in import_checkpoint(folder, out, dtype):
        typer.echo(line)


def serve(
    folder: Folder,
    host: Annotated[str, typer.Option(help="Address to listen on; this machine alone by default.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 …")] = "cpu",
) -> None:
    """Serve an emitted model by OpenAI's protocol (chat, completions, models, streaming), with transformers' server."""
    from mxfx.driver.run_directory import find_model
    from mxfx.driver.serve import serve as run

    run(find_model(folder), host=host, port=port, device=device)


def doctor() -> None:
    """What mxfx finds here: versions, device, kernels, optional packages, caches."""
    from mxfx.driver.doctor import lines

    for line in lines():
        typer.echo(line)


COMMANDS = {"export": export, "import": import_, "serve": serve, "doctor": doctor}
