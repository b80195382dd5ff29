"""What the command line adds to pipeline files, checked before anything slow begins."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from mxfx.config.errors import ConfigError, Place
from mxfx.evaluation.tasks import TaskOptions
from mxfx.evaluation.wanted import Wanted, kind

_DEVICE = re.compile(r"(cpu|cuda)(:\d+)?")
#: Precisions that a model is loaded, and its graph runs, in.
DTYPES = ("bfloat16", "float16", "float32", "float64")


@dataclass
class RunOptions:
    """What the command line adds to a pipeline file.

    ``eval`` is what ``Wanted.parse`` reads. ``eval_data`` is a local file or folder of documents that stands for
    ``wikitext``; without it lm-eval's comes from the hub. ``limit_tokens`` bounds the text of the first domain,
    ``domain_tokens`` that of each other. ``tasks`` are options of lm-eval's tasks. ``out`` owns the run: results,
    emitted models, dumps.
    """

    model: str | None = None
    data: str | None = None
    eval: str | None = None
    eval_data: str | None = None
    limit_tokens: int | None = None
    domain_tokens: int | None = None
    tasks: TaskOptions = field(default_factory=TaskOptions)
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
        wanted = self.wanted()
        if wanted is not None:
            wanted.check()
        texts = [] if wanted is None else [name for name in wanted.names if kind(name) == "text"]
        if self.eval_data is not None:
            texts.append(self.eval_data)
        if not texts and self.data is None:
            return
        from mxfx.calibration.datasets import check_source
        from mxfx.calibration.sources import SELF

        for text in texts:
            check_source(text, hub=False)
        # Token ids are held against the samples asked for, by the pipeline's check.
        if self.data is not None and self.data != SELF and not self.data.endswith(".pt"):
            check_source(self.data)

    def wanted(self) -> Wanted | None:
        """What is to be evaluated; None for nothing. Raises ``EvaluationError``."""
        if self.eval is None:
            return None
        return Wanted.parse(
            self.eval,
            eval_data=self.eval_data,
            limit_tokens=self.limit_tokens,
            domain_tokens=self.domain_tokens,
            batch_size=self.batch_size,
            tasks=self.tasks,
        )


def check_dtype(dtype: str) -> None:
    """Raise ``ConfigError`` for a precision that no graph runs in."""
    if dtype not in DTYPES:
        raise ConfigError(Place("--dtype"), f"unknown dtype {dtype!r}", f"one of {', '.join(DTYPES)}")


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
