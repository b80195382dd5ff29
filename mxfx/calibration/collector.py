"""Token ids that a model is fed, kept as a calibration set: the collector of Mase and PLENA, and its file."""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mxfx.calibration.datasets import DatasetError
from mxfx.ground.errors import MxfxError
from mxfx.ground.files import write_file

_log = logging.getLogger(__name__)

#: Attribute of a model that is being listened to; Mase has one of its own.
_ATTACHED = "_mxfx_token_collector"
_VERSION = 1
#: What a loss leaves out, by PyTorch's convention.
_IGNORED = -100


class CollectorFull(MxfxError):
    """The file is written and ``raise_on_full`` was asked for: the evaluation that feeds the model can stop."""


def as_loader(ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Samples as Mase's loaders hold them: ``(ids, target)``, int64 ``(1, length)``; the target is the last token."""
    pairs = []
    for row in ids:
        sample = row.reshape(1, -1).clone()
        target = torch.full_like(sample, _IGNORED)
        target[:, -1] = sample[:, -1]
        pairs.append((sample, target))
    return pairs


class TokenCollector:
    """Keeps the ids that a model is called with, joined and cut into samples, in a file that ``file:`` data sets read.

    Calls of fewer than ``min_prefill_tokens`` tokens (steps of decoding) are left out, and so are the places that an
    attention mask leaves out. The rows of a batch follow each other. The file is written once ``target_nsamples`` of
    ``seqlen`` tokens are there: ``{"loader": [(ids, target), …], "seqlen", "target_nsamples", "collected_samples",
    "format_version"}``, the format of Mase's class of this name.

    Raises ``FileExistsError`` from ``attach`` where the file is there and ``overwrite`` is not given, and
    ``CollectorFull`` out of the model's call that fills it where ``raise_on_full`` is.
    """

    def __init__(
        self,
        model: nn.Module | None,
        target_nsamples: int,
        seqlen: int,
        save_path: str | Path,
        overwrite: bool = False,
        min_prefill_tokens: int = 8,
        raise_on_full: bool = False,
    ) -> None:
        if target_nsamples < 1 or seqlen < 1:
            raise DatasetError(f"target_nsamples={target_nsamples}, seqlen={seqlen}: expected 1 or more of each")
        self.model = model
        self.target_nsamples = target_nsamples
        self.seqlen = seqlen
        self.save_path = Path(save_path)
        self.overwrite = overwrite
        self.min_prefill_tokens = min_prefill_tokens
        self.raise_on_full = raise_on_full
        self.samples = 0
        """Samples that were written."""
        self._parts: list[Tensor] = []
        self._handle: RemovableHandle | None = None

    @property
    def total_tokens(self) -> int:
        return sum(part.numel() for part in self._parts)

    @property
    def complete(self) -> bool:
        """Whether the file is written."""
        return self.samples > 0

    def check_path(self) -> None:
        """Raises ``FileExistsError`` for a file that would be lost."""
        if self.save_path.exists() and not self.overwrite:
            raise FileExistsError(f"{self.save_path} is there already: give overwrite=True, or another file")

    def attach(self) -> TokenCollector:
        """Listen to ``model`` from now on."""
        self.check_path()
        self.listen(self.model)
        return self

    def listen(self, model: nn.Module | None) -> None:
        """Listen to another model in place of this one; None: to none."""
        if self._handle is not None:
            self._handle.remove()
            delattr(self.model, _ATTACHED)
        self.model, self._handle = model, None
        if model is not None:
            self._handle = model.register_forward_pre_hook(self._hear, with_kwargs=True)
            object.__setattr__(model, _ATTACHED, self)

    def add(self, ids: Tensor) -> None:
        """Take the ids of one call, int64 ``(tokens,)``; short ones, and what comes when the file is written, are not.

        Raises ``CollectorFull`` where ``raise_on_full`` is given.
        """
        if self.complete or ids.numel() < self.min_prefill_tokens:
            return
        self._parts.append(ids.detach().to("cpu", torch.int64))
        if self.total_tokens >= self.target_nsamples * self.seqlen:
            self._write()
            if self.raise_on_full:
                raise CollectorFull(f"{self.samples} samples of {self.seqlen} tokens are in {self.save_path}")

    def finalize(self) -> None:
        """Write the whole samples that are there, and stop listening; warns where they are fewer than asked for."""
        if self.complete:
            return
        wanted = self.target_nsamples * self.seqlen
        if self.total_tokens < self.seqlen:
            _log.warning("%d tokens are no sample of %d: nothing is written", self.total_tokens, self.seqlen)
            self.listen(None)
            return
        _log.warning("%d of %d tokens: %s has fewer samples", self.total_tokens, wanted, self.save_path)
        self._write()

    def _hear(self, _module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.shape[-1] < self.min_prefill_tokens:
            return
        mask = kwargs.get("attention_mask")
        seen = isinstance(mask, Tensor) and mask.shape == ids.shape
        self.add(ids[mask.bool()] if seen else ids.flatten())

    def _write(self) -> None:
        joined = torch.cat(self._parts)
        count = min(joined.numel() // self.seqlen, self.target_nsamples)
        stored = io.BytesIO()
        content = {
            "loader": as_loader(joined[: count * self.seqlen].view(count, self.seqlen)),
            "seqlen": self.seqlen,
            "target_nsamples": self.target_nsamples,
            "collected_samples": count,
            "format_version": _VERSION,
        }
        torch.save(content, stored)
        self.save_path.parent.mkdir(parents=True, exist_ok=True)
        write_file(self.save_path, stored.getvalue())
        self.samples = count
        self.listen(None)


def collector_of(model: nn.Module) -> TokenCollector | None:
    """The collector that listens to a model."""
    return getattr(model, _ATTACHED, None)
