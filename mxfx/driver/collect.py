"""``mxfx collect``: a calibration set of a task's prompts, tokenized as the model will see them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from mxfx.calibration.collector import CollectorFull, TokenCollector
from mxfx.calibration.datasets import DatasetError
from mxfx.calibration.prompts import check_prompts, prompts
from mxfx.driver.pretrained import load_model, load_tokenizer
from mxfx.evaluation.tasks import TaskOptions, check_task, run_task
from mxfx.ground import ranks

_TASK = "lm_eval:"
#: Documents of a task where its name gives no number, as in PLENA.
_TASK_LIMIT = 20


@dataclass(frozen=True)
class Collected:
    """What is in the file: ``samples`` of ``wanted``, each of ``length`` tokens; ``fed`` prompts were taken for it."""

    file: Path
    samples: int
    wanted: int
    length: int
    fed: int | None = None


def collect(
    source: str,
    model: str | Path,
    collector: TokenCollector,
    *,
    template: str | None = None,
    max_prompts: int | None = None,
    include_path: Path | None = None,
    dtype: str = "bfloat16",
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> Collected:
    """Fill ``collector``, attached to no model, from ``source``; its file is written.

    Prompts (see ``mxfx.calibration.prompts``) are tokenized with the tokenizer's own special tokens, each cut to a
    sample's length; no model is read for them. ``lm_eval:TASK[:DOCUMENTS]`` runs the task on the model and keeps what
    it is fed, few-shot examples and all.

    Raises ``DatasetError`` (nothing to collect), ``EvaluationError``, ``ModelError``, ``FileExistsError``.
    """
    if ranks.world() > 1:
        raise DatasetError(f"{source}: one process collects, {ranks.world()} were started; leave torchrun out")
    collector.check_path()
    if source.startswith(_TASK):
        _run_task(source, model, collector, include_path, dtype, device, trust_remote_code)
        fed = None
    else:
        check_prompts(source)
        tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
        fed = 0
        for text in prompts(source, template):
            if collector.complete or fed == max_prompts:
                break
            ids = tokenizer(text, truncation=True, max_length=collector.seqlen)["input_ids"]
            if len(ids) >= collector.min_prefill_tokens:
                collector.add(torch.tensor(ids, dtype=torch.int64))
                fed += 1
    collector.finalize()
    if not collector.complete:
        raise DatasetError(
            f"{source}: gives {collector.total_tokens} tokens, and a sample is {collector.seqlen}: "
            "give more prompts, or shorter samples"
        )
    return Collected(collector.save_path, collector.samples, collector.target_nsamples, collector.seqlen, fed)


def _run_task(
    source: str,
    name: str | Path,
    collector: TokenCollector,
    include_path: Path | None,
    dtype: str,
    device: str,
    trust_remote_code: bool,
) -> None:
    task, _, limit = source.removeprefix(_TASK).partition(":")
    if limit and not limit.isdecimal():
        raise DatasetError(f"{source}: expected lm_eval:TASK or lm_eval:TASK:DOCUMENTS, a whole number")
    check_task(task, include_path)
    tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
    model = load_model(name, dtype, trust_remote_code=trust_remote_code).to(device)
    options = TaskOptions(limit=int(limit or _TASK_LIMIT), include_path=include_path)
    collector.raise_on_full = True
    collector.listen(model)
    try:
        # One document at a time: lm-eval fills the rows of a batch up without a mask that tells.
        run_task(model, tokenizer, task, options, max_length=collector.seqlen)
    except CollectorFull:
        pass
    finally:
        collector.listen(None)
