"""``mxfx generate``: text from a model, as it is written."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def generate(
    model: Annotated[
        str, typer.Argument(metavar="DIR", help="Run directory or the model folder in it; or a Hugging Face model.")
    ],
    prompt: Annotated[str, typer.Option(help="Text to continue; - reads it from standard input.")],
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is a user's turn of the chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    sample: Annotated[
        bool | None, typer.Option("--sample/--greedy", help="Overrides the model's generation config.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Precision of a Hugging Face model.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 …")] = "cpu",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that the model's repository ships.")
    ] = False,
) -> None:
    """Text from a model as it is written, then how fast that was."""
    from mxfx.config import ConfigError, Place
    from mxfx.config.pipeline import no_model

    if not Path(model).is_dir() and (wrong := no_model(model)) is not None:
        # Before transformers is imported.
        raise ConfigError(Place("DIR"), *wrong)
    from mxfx.driver.generate import open_model, write

    found, tokenizer = open_model(model, device, dtype=dtype, trust_remote_code=trust_remote_code)

    def say(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    if prompt == "-":
        prompt = sys.stdin.read().removesuffix("\n")
    written = write(found, tokenizer, prompt, chat=chat, max_new_tokens=max_new_tokens, sample=sample, say=say)
    sys.stdout.write("\n")
    typer.echo(str(written), err=True)


COMMANDS = {"generate": generate}
