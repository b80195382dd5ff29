"""Scores of windows: log-likelihood, divergence from the float model and likeliest token, position by position."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mxfx.evaluation.recorded import Forward
from mxfx.evaluation.results import Scores
from mxfx.evaluation.windows import Window, equal_lengths
from mxfx.ground import ranks
from mxfx.ground.files import temporary_folder
from mxfx.ground.progress import track
from mxfx.ops.kernels.divergence import logit_rows

#: Rows of logits that are in float32 at one time: on a CPU so few that memory is used again instead of given out anew.
_ROWS = {"cuda": 512, "cpu": 64}
#: Logits that are kept on disk: 12,000 tokens of a vocabulary of 150,000 in 16 bits take 3.6 GB.
_KEEP_BYTES = 8 << 30
_LIKELIEST = 3


@dataclass(frozen=True)
class Worst:
    """The position of a window where the divergence is largest; likeliest tokens with their probabilities."""

    window: int
    position: int
    kl: float
    expected: list[tuple[int, float]]
    actual: list[tuple[int, float]]


class FloatLogits:
    """Logits of the float model, shared by every model of a run that is compared with it.

    `make` builds the float model when it is needed; `release` lets go of it. On a CPU, logits are kept in files in the
    model's own dtype, up to `keep_bytes` and half of what the disk has left: a forward pass costs more than reading
    them. What is not kept is computed again. On a GPU nothing is kept: there computing is faster than reading.
    """

    def __init__(self, make: Callable[[], Any], *, keep_bytes: int | None = None) -> None:
        self._make = make
        self._model: Any = None
        self._room = keep_bytes
        self._folder: tempfile.TemporaryDirectory | None = None

    def __call__(
        self, key: str, windows: Sequence[Window], chosen: Sequence[int], forward: Forward | None = None
    ) -> list[Tensor]:
        """Logits `(scored, vocabulary)` of the chosen windows of a domain whose text has the digest `key`."""
        paths = [self._path(f"{key[:16]}-{index}") for index in chosen]
        kept = [path is not None and path.exists() for path in paths]
        if all(kept):
            return [load_file(path)["logits"] for path in paths if path is not None]
        found = logits_of(self.model, [windows[index] for index in chosen], forward)
        for path, logits in zip(paths, found, strict=True):
            self._keep(path, logits)
        return found

    @property
    def model(self) -> Any:
        if self._model is None:
            self._model = self._make()
        return self._model

    def is_of(self, model: Any) -> bool:
        """Whether ``model`` is the float model itself."""
        return model is self._model

    def release(self) -> None:
        """Let go of the model, so that passes have the device for themselves; what is on disk stays."""
        self._model = None

    def _path(self, name: str) -> Path | None:
        if self._room is None:
            self._room = 0 if self.model.device.type != "cpu" else _KEEP_BYTES
        if self._room == 0 and self._folder is None:
            return None
        if self._folder is None:
            self._folder = temporary_folder("mxfx-logits-")
            self._room = min(self._room, shutil.disk_usage(self._folder.name).free // 2)
        return Path(self._folder.name) / f"{name}.safetensors"

    def _keep(self, path: Path | None, logits: Tensor) -> None:
        size = logits.numel() * logits.element_size()
        if path is None or self._room is None or size > self._room:
            return
        self._room -= size
        save_file({"logits": logits.to("cpu").contiguous()}, path)


def logits_of(model: Any, windows: Sequence[Window], forward: Forward | None = None) -> list[Tensor]:
    """Logits `(scored, vocabulary)` of windows of one length, on the model's device, in its dtype.

    Those of a `forward` hold until the next.
    """
    ids = torch.stack([window.ids for window in windows])
    logits = (forward or Forward())(model, ids)
    return [row[-window.scored :] for row, window in zip(logits, windows, strict=True)]


def score(
    model: Any,
    windows: Sequence[Window],
    *,
    batch_size: int = 1,
    reference: FloatLogits | None = None,
    key: str = "",
    title: str = "perplexity",
) -> tuple[Scores, list[Worst]]:
    """Score every window; `reference` and `key` (digest of the text) ask for the divergence from the float model too.

    Float32 log-softmax, a few rows at a time: float32 logits of a whole window would be the largest tensor of the run.
    """
    columns: dict[str, list[Tensor]] = {"loglikelihood": [], "top": [], "kl": [], "float_top": []}
    worst: list[Worst] = []
    batches = equal_lengths(windows, batch_size)
    batches = batches[ranks.share(len(batches))]
    own = reference is not None and reference.is_of(model)
    forward = Forward((len(batch), windows[batch[0]].ids.numel()) for batch in batches)
    with torch.no_grad():
        for batch in track(batches, title, len(batches)):
            expected: Sequence[Tensor | None] = [None] * len(batch)
            if own and reference is not None:
                # What the float model says of itself is no divergence; its logits are kept for the others.
                actual = reference(key, windows, batch, forward)
            else:
                actual = logits_of(model, [windows[index] for index in batch], forward)
                expected = expected if reference is None else reference(key, windows, batch, forward)
            for index, mine, theirs in zip(batch, actual, expected, strict=True):
                found = _score_rows(mine, windows[index].targets, theirs)
                for name, values in found.items():
                    columns[name].append(values.cpu())
                if theirs is not None:
                    worst.append(_worst(index, mine, theirs, found["kl"]))
    found_by_rank = ranks.collected(({name: torch.cat(parts) for name, parts in columns.items() if parts}, worst))
    names = {name for mine, _ in found_by_rank for name in mine}
    joined = {name: torch.cat([mine[name] for mine, _ in found_by_rank if mine]) for name in names}
    worst = [place for _, of_rank in found_by_rank for place in of_rank]
    sizes = torch.tensor([window.scored for window in windows])
    return Scores(
        targets=torch.cat([window.targets for window in windows]).int(),
        window=torch.arange(len(windows)).repeat_interleave(sizes).int(),
        **joined,
    ), worst


def _score_rows(logits: Tensor, targets: Tensor, expected: Tensor | None) -> dict[str, Tensor]:
    rows = logit_rows(logits, expected, targets=targets)
    if rows is not None:
        scores = {"loglikelihood": rows.loglikelihood, "top": rows.top, "kl": rows.kl, "float_top": rows.expected_top}
        return {name: values for name, values in scores.items() if values is not None}
    parts: list[dict[str, Tensor]] = []
    for start, given in _rows(logits):
        rows = given.float()
        log_p = rows.log_softmax(-1)
        wanted = targets[start : start + len(rows), None].to(rows.device)
        found = {"loglikelihood": log_p.gather(-1, wanted)[:, 0], "top": rows.argmax(-1).int()}
        if expected is not None:
            theirs = expected[start : start + len(rows)].to(rows.device).float()
            log_q = theirs.log_softmax(-1)
            # Written so that a probability of zero adds nothing rather than NaN.
            found["kl"] = torch.nn.functional.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
            found["float_top"] = theirs.argmax(-1).int()
        parts.append(found)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _rows(logits: Tensor) -> Iterator[tuple[int, Tensor]]:
    start = 0
    for rows in logits.split(_ROWS.get(logits.device.type, _ROWS["cpu"])):
        yield start, rows
        start += len(rows)


def _worst(window: int, logits: Tensor, expected: Tensor, kl: Tensor) -> Worst:
    at = int(kl.nan_to_num(float("inf")).argmax())
    return Worst(window, at, float(kl[at]), _likeliest(expected[at]), _likeliest(logits[at]))


def _likeliest(logits: Tensor) -> list[tuple[int, float]]:
    found = logits.float().softmax(-1).topk(min(_LIKELIEST, logits.numel()))
    return list(zip(found.indices.tolist(), found.values.tolist(), strict=True))
