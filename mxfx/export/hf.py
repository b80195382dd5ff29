"""``--to hf``: the source model's own class with rounded weights in the program's dtype."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mxfx.export.plain import Plain
from mxfx.export.prove import opened, same_logits, same_values
from mxfx.export.target import Target, register


def refuse(given: Plain) -> str | None:
    """A plain model rounds nothing as it runs, so activations in full precision are all that it can mean."""
    return f"{given.lost[0]}; --bake puts transforms into the weights and rounds weights alone" if given.lost else None


def write(given: Plain, folder: Path, tokenizer: Any) -> tuple[str, ...]:
    given.model().save_pretrained(folder)
    given.write_generation(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    notes = []
    if rounded := len(given.formats) + len(given.turned):
        notes.append(f"{rounded} weights lie on their grids, stored in {given.program.dtype}")
    if given.inputs:
        notes.append(f"the inputs of {len(given.inputs)} linears are in full precision: a plain model rounds none")
    return tuple(notes)


def prove(given: Plain, folder: Path) -> Mapping[str, object]:
    model = opened(folder)
    named = dict(model.named_parameters(remove_duplicate=False))
    return same_values(given, {name: tensor.detach() for name, tensor in named.items()}) | same_logits(given, model)


register(Target("hf", "a plain Hugging Face model, weights rounded", refuse, write, prove))
