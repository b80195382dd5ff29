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

from mxfx.calibration.keys import digest, token_key
from mxfx.calibration.sampling import rendered, self_samples, start_token
from mxfx.config import Pipeline
from mxfx.driver.fitting import fitting_lm
from mxfx.evaluation.chat import chat_domain
from mxfx.evaluation.evaluate import Domain
from mxfx.graph.program import Program
from mxfx.graph.tensor_file import read_tensors, tensors_hash, write_tensors
from mxfx.graph.trace import trace
from mxfx.ground.clock import part
from mxfx.ground.files import DamagedFile, cache_home
from mxfx.ground.progress import track
from mxfx.pipeline.manager import PassManager

_log = logging.getLogger(__name__)


class FloatTexts:
    """Texts of one float model of transformers, which keeps its keys and values between tokens.

    ``device`` is where it writes, as the emitted graph of ``program`` (None: traced here) where that has a cache: its
    steps are replayed on a GPU and taken by C kernels on a CPU.
    ``cache`` (None: the user's) keeps what it wrote under a hash of its weights: a later run reads it.
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
        key = digest([self.key, *begun, samples, length, seed])
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
        """Hash of the model's weights and dtypes."""
        if not self._key:
            self._key = tensors_hash(self._model.state_dict())
        return self._key

    def _release(self) -> None:
        """Give a GPU's memory back now: recorded steps and their caches hold each other, up to half of it."""
        if self._device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()

    def emitted(self) -> nn.Module:
        """The float model as its emitted graph; itself, with a warning, where that has no cache.

        Transformers' cache is copied with each token and its heads with each layer: on a GPU several times slower.
        """
        wide = self._device.type == "cpu" and not _multiplies_short_floats()
        program = self._program().twin(torch.float32) if wide else self._program()
        model = fitting_lm(PassManager().run(program, Pipeline([]).completed()).program, self._device)
        if model.specs:
            return model
        _log.warning("the float model's graph has no cache of keys and values: it writes its texts slowly")
        return copy.deepcopy(self._model).float() if wide else self._model.to(self._device)


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
