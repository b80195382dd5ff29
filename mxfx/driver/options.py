"""What the command line adds to pipeline files, checked before anything slow begins."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from mxfx.config.errors import ConfigError, Place

_DEVICE = re.compile(r"(cpu|cuda)(:\d+)?")

#: What ``--eval`` takes.
TASKS = ("wikitext",)


@dataclass
class RunOptions:
    """What the command line adds to a pipeline file.

    ``eval_data`` is a local file or folder of documents; without it lm-eval's ``wikitext`` comes from the hub.
    ``limit_tokens`` bounds the evaluated text. ``out`` owns the run: results, emitted models, dumps.
    """

    model: str | None = None
    data: str | None = None
    eval: str | None = None
    eval_data: str | None = None
    limit_tokens: int | None = None
    batch_size: int = 1
    out: Path | None = None
    device: str = "cpu"
    overrides: tuple[str, ...] = ()
    strict: bool = False
    save: bool = True
    float_row: bool = True
    trust_remote_code: bool = False
    say: Callable[[str], None] = field(default=lambda line: None)

    def check(self) -> None:
        """Raise ``ConfigError`` or ``DatasetError`` for what is known to be wrong at once; no file is read."""
        check_device(self.device)
        check_task(self.eval)
        if self.eval_data is None and self.data is None:
            return
        from mxfx.calibration.datasets import check_source
        from mxfx.calibration.sources import SELF

        if self.eval_data is not None:
            check_source(self.eval_data, hub=False)
        if self.data is not None and self.data != SELF:
            check_source(self.data)


def check_device(device: str) -> None:
    """Raise ``ConfigError`` for a device that mxfx does not run on, or that is not there."""
    if not _DEVICE.fullmatch(device):
        raise ConfigError(Place("--device"), f"unknown device {device!r}", "cpu, cuda or cuda:N")
    if device.startswith("cuda"):
        import torch

        count, wanted = torch.cuda.device_count(), int(device.partition(":")[2] or 0)
        if count == 0:
            problem = f"{device!r} was asked for and torch sees no CUDA device"
            raise ConfigError(Place("--device"), problem, "cpu here")
        if wanted >= count:
            raise ConfigError(Place("--device"), f"there is no {device!r}", f"cuda:0 … cuda:{count - 1}")


def check_task(task: str | None) -> None:
    """Raise ``ConfigError`` for an evaluation that does not exist; None is none."""
    if task is not None and task not in TASKS:
        raise ConfigError(Place("--eval"), f"unknown evaluation task {task!r}", f"one of {', '.join(TASKS)}")
