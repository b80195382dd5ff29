"""Text out of a model, as it is written: what ``mxfx generate`` does."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TextStreamer

from mxfx.config import Pipeline
from mxfx.config.pipeline import no_model
from mxfx.driver.options import check_device, check_dtype
from mxfx.driver.pretrained import load_checked, load_tokenizer
from mxfx.driver.proof import inexact_told
from mxfx.driver.run_directory import NoRun, find_model
from mxfx.graph.trace import trace
from mxfx.ground.errors import MxfxError
from mxfx.pipeline.manager import PassManager
from mxfx.runtime.causal_lm import EmittedCausalLM, as_causal_lm


class GenerateError(MxfxError, ValueError):
    """A prompt that a model cannot be given."""


@dataclass(frozen=True)
class Written:
    """What was generated: ``tokens`` of it in ``seconds``, the first of them after ``first``.

    ``full``: the model reads no more than the prompt and these. ``warnings``: of what was lost on the way.
    """

    text: str
    tokens: int
    seconds: float
    first: float
    full: bool = False
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        said = f"{self.tokens} tokens, the first after {self.first:.2f} s"
        if self.tokens > 1:
            said += f", then {(self.tokens - 1) / max(self.seconds - self.first, 1e-9):.1f} tokens/s"
        said += "; the model's context is full" if self.full else ""
        return "\n".join([said, *(f"warning: {warning}" for warning in self.warnings)])


def open_model(
    name: str | Path, device: str = "cpu", *, dtype: str = "float32", trust_remote_code: bool = False
) -> tuple[EmittedCausalLM, Any]:
    """The emitted model of a run directory and its tokenizer; or a Hugging Face model, emitted as it is in ``dtype``.

    Raises ``ConfigError``, ``NoRun``, ``ArtefactError``, ``ModelError``, ``TraceError``.
    """
    from mxfx.export.artefact import MANIFEST
    from mxfx.export.folder import MxfxForCausalLM

    check_device(device)
    check_dtype(dtype)
    saved = find_model(name)
    if (saved / MANIFEST).is_file():
        tokenizer = load_tokenizer(saved, trust_remote_code=trust_remote_code)
        return MxfxForCausalLM.from_pretrained(saved, device_map=device), tokenizer
    if saved.is_dir() and (wrong := no_model(str(saved))) is not None:
        raise NoRun(f"{wrong[0]}: no model, nor one that a run wrote to the end; expected {wrong[1]}")
    tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
    model = load_checked(name, dtype, trust_remote_code=trust_remote_code).model.to(device)
    raised = PassManager().run(trace(model, name=str(name)), Pipeline([]).completed()).program
    return as_causal_lm(raised, device), tokenizer


def write(
    model: EmittedCausalLM,
    tokenizer: Any,
    prompt: str,
    *,
    chat: bool = False,
    max_new_tokens: int = 128,
    sample: bool | None = None,
    say: Callable[[str], None] = lambda piece: None,
) -> Written:
    """Continue ``prompt``, or answer it as a user's turn of the chat template; ``say`` gets the text piece by piece.

    ``sample`` chooses sampling or the most likely token; None leaves it to the model's generation config. What
    is written ends where the model's context is full.

    Raises ``GenerateError`` for an empty prompt, for one that leaves no room, and for a model without a chat template.
    """
    if chat and not getattr(tokenizer, "chat_template", None):
        raise GenerateError("--chat: the tokenizer has no chat template; give the prompt without --chat")
    asked = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True) if chat else prompt
    # The template writes its own special tokens.
    given = tokenizer(text, return_tensors="pt", add_special_tokens=not chat).to(model.device)
    ids = given["input_ids"]
    longest = getattr(model.config, "max_position_embeddings", None)
    if ids.shape[1] == 0:
        raise GenerateError("the prompt has no tokens; give some text with --prompt")
    if longest is not None and ids.shape[1] >= longest:
        raise GenerateError(f"the prompt has {ids.shape[1]:,} tokens, the model reads at most {longest:,}")
    room = max_new_tokens if longest is None else min(max_new_tokens, longest - ids.shape[1])
    streamer = _Timed(tokenizer, say)
    options = {} if sample is None else {"do_sample": sample}
    warnings: list[str] = []
    began = time.perf_counter()
    with torch.no_grad(), inexact_told(warnings):
        out = model.generate(
            ids,
            attention_mask=given["attention_mask"],
            max_new_tokens=room,
            pad_token_id=_padding(model, tokenizer),
            streamer=streamer,
            **options,
        )
    seconds = time.perf_counter() - began
    new = out[0, ids.shape[1] :]
    return Written(
        tokenizer.decode(new, skip_special_tokens=True),
        len(new),
        seconds,
        (streamer.first or time.perf_counter()) - began,
        len(new) == room < max_new_tokens,
        tuple(warnings),
    )


def _padding(model: EmittedCausalLM, tokenizer: Any) -> int | None:
    """One text is never padded; without a token for it ``generate`` would warn."""
    ends = model.generation_config.eos_token_id
    end = ends[0] if isinstance(ends, list) and ends else ends
    found = (model.generation_config.pad_token_id, tokenizer.pad_token_id, end)
    return next((one for one in found if one is not None), None)


class _Timed(TextStreamer):
    """Passes text on as it becomes certain, and notes when the first token came."""

    def __init__(self, tokenizer: Any, say: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._say = say
        self.first: float | None = None
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen and self.first is None:
            self.first = time.perf_counter()
        self._prompt_seen = True
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._say(text)
