"""What the float model writes for a run: calibration samples and chat answers, made once, kept under its hash."""

from __future__ import annotations

import copy
import gc
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mxfx.calibration.keys import digest, environment, token_key
from mxfx.calibration.sampling import rendered, self_samples, start_token
from mxfx.config import Pipeline
from mxfx.driver.fitting import fitting_lm
from mxfx.evaluation.chat import chat_domain
from mxfx.evaluation.evaluate import Domain
from mxfx.graph.program import Program
from mxfx.graph.tensor_file import read_tensors, tensors_hash, write_tensors
from mxfx.graph.trace import trace
from mxfx.ground.clock import part
from mxfx.ground.files import DamagedFile, cache_home, parse_json
from mxfx.ground.progress import track
from mxfx.pipeline.manager import PassManager

_log = logging.getLogger(__name__)

#: Of a configuration, where the model lies and what wrote it: no part of what it says.
_NO_PART = frozenset({"_name_or_path", "transformers_version"})


class FloatTexts:
    """Texts of one float model of transformers, which keeps its keys and values between tokens.

    ``device`` is where it writes, as the emitted graph of ``program`` (None: traced here) where that has a cache: its
    steps are replayed on a GPU and taken by C kernels on a CPU.
    ``cache`` (None: the user's) keeps what it wrote: a later run reads it. Samples, which decide what a run makes of
    weights, are kept under all that decides them, device and versions too. Answers, on which models are compared, are
    those of whichever device was the first to write them.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        device: torch.device | str,
        cache: Path | None = None,
        program: Callable[[], Program] | None = None,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._device = torch.device(device)
        self._cache = cache or cache_home()
        self._program = program or (lambda: trace(model))
        self._key = ""

    def samples(self, samples: int, length: int, seed: int, openings: Tensor | None = None) -> Tensor:
        """Sequences for ``calibration.dataset = "self"``; see ``self_samples``."""
        turn = rendered(self._tokenizer, [{"role": "user", "content": "x"}])
        begun = [start_token(self._tokenizer), turn] if openings is None else [token_key(openings)]
        # One process writes them, for however many.
        made_by = {name: of for name, of in environment(self._device).items() if name != "ranks"} | {"wide": self._wide}
        key = digest([self.key, *begun, samples, length, seed, made_by])
        file = self._cache / f"self-{key}.safetensors"
        found = _read(file)
        if found is None:
            with part("own samples"):
                options = {"samples": samples, "length": length, "seed": seed, "openings": openings}
                found = self_samples(self.emitted(), self._tokenizer, progress=track, **options)
            write_tensors(file, {"ids": found})
            self._release()
        return found

    def chat(self, limit_tokens: int | None, max_length: int, sampling: dict[str, float] | None = None) -> Domain:
        """The domain ``chat``; see ``chat_domain``."""
        with part("chat answers"):
            found = chat_domain(
                self.emitted,
                self._tokenizer,
                model_key=self.key,
                limit_tokens=limit_tokens,
                max_length=max_length,
                sampling=sampling or {},
                cache=self._cache,
            )
        self._release()
        return found

    @property
    def key(self) -> str:
        """Hash of what the model's words depend on: weights, configuration, tokens that end an answer."""
        if not self._key:
            config = parse_json(self._model.config.to_json_string(use_diff=False), "the configuration")
            ends = getattr(getattr(self._model, "generation_config", None), "eos_token_id", None)
            said = {name: value for name, value in config.items() if name not in _NO_PART}
            self._key = digest([tensors_hash(self._model.state_dict()), said, ends])
        return self._key

    @property
    def _wide(self) -> bool:
        """Whether it writes in float32, whatever its own precision."""
        return self._device.type == "cpu" and not _multiplies_short_floats()

    def _release(self) -> None:
        """Give a GPU's memory back now: recorded steps and their caches hold each other, up to half of it."""
        if self._device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()

    def emitted(self) -> nn.Module:
        """The float model as its emitted graph; itself, with a warning, where that has no cache.

        Transformers' cache is copied with each token and its heads with each layer: on a GPU several times slower.
        """
        program = self._program().twin(torch.float32) if self._wide else self._program()
        model = fitting_lm(PassManager().run(program, Pipeline([]).completed()).program, self._device)
        if model.specs:
            return model
        _log.warning("the float model's graph has no cache of keys and values: it writes its texts slowly")
        return copy.deepcopy(self._model).float() if self._wide else self._model.to(self._device)


def _multiplies_short_floats() -> bool:
    """Whether this CPU has units for bfloat16: without them float32 takes half of the time a token, same weights."""
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def _read(file: Path) -> Tensor | None:
    if not file.exists():
        return None
    try:
        return read_tensors(file)[0]["ids"]
    except (DamagedFile, KeyError) as error:
        _log.warning("%s; the samples are written again", error)
        return None
