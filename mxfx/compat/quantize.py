"""The tutorial's entry point: a model and ``pass_args`` in, a quantized causal LM out."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from mxfx.calibration.collector import collector_of
from mxfx.compat.tutorial import from_pass_args, unwrapped
from mxfx.config.pipeline import Pipeline
from mxfx.driver.job import Job, default_instruments
from mxfx.driver.pretrained import load_tokenizer
from mxfx.export.folder import MxfxForCausalLM
from mxfx.pipeline.manager import Instrument, PipelineResult
from mxfx.rewrite import PassRecord


def quantize_module_transform_pass(
    model: nn.Module, pass_args: Mapping[str, Any], *, instruments: Sequence[Instrument] | None = None
) -> tuple[MxfxForCausalLM, dict[str, Any]]:
    """Compile ``model`` as ``pass_args`` says; returns ``(model, {})`` like the tutorial's function of that name.

    The returned model has ``.config``, ``.device``, ``generate`` and goes into ``HFLM(pretrained=…)`` as it is;
    ``save_pretrained`` writes a folder that ``AutoModelForCausalLM`` opens once mxfx is imported. Unlike in the
    tutorial the model given is not changed. Calibration data come from the hub, or from the local file that
    ``[gptq] dataset`` names. Every pass is held to its promise and the graph is verified; ``instruments=()`` leaves
    that out. Passes run on the ``device`` of ``[gptq]`` or ``[rotation_search]``, else on the first CUDA device there
    is; the result comes back to where the model given lies. A collector that listens to the model goes over to it.

    What a pass warns of is warned of in Python. Raises ``ConfigError`` for arguments that cannot be honoured, before
    any weight is touched.
    """
    pipeline = from_pass_args(pass_args)
    home = next(model.parameters()).device
    device = device_of(pass_args, home)
    if device.type == home.type:
        # Elsewhere the graph is emitted once it is back: kernels are those of the device that it stays on.
        pipeline = pipeline.emitted(home.type)
    collector = collector_of(model)
    if collector is not None:
        # What is traced and calibrated is nothing that the model was asked.
        collector.listen(None)
    try:
        done = job_of(model, pipeline, device).run(
            pipeline, default_instruments(pipeline) if instruments is None else instruments
        )
        say_warnings(done.records)
        emitted = saveable(done, home)
    except BaseException:
        if collector is not None:
            collector.listen(model)
        raise
    if collector is not None:
        collector.listen(emitted)
    return emitted, {}


def saveable(done: PipelineResult, home: torch.device) -> MxfxForCausalLM:
    """The model of a pipeline's result, on ``home``; emitted there unless the emit stage has run for it."""
    return MxfxForCausalLM(done.portable, home, ready=done.program)


def device_of(pass_args: Mapping[str, Any], home: torch.device) -> torch.device:
    """The device that a block names (``cuda:0``, a number, a ``torch.device``), else the first CUDA device, else
    ``home``.
    """
    for block in ("gptq", "rotation_search"):
        named = unwrapped(pass_args.get(block, {})).get("device")
        if named is not None:
            return torch.device(named)
    return torch.device("cuda", 0) if torch.cuda.is_available() else home


def job_of(model: nn.Module, pipeline: Pipeline, device: torch.device) -> Job:
    """The job of a model in memory; the tokenizer of the model that is named reads calibration data when asked."""
    job = Job.of_model(model, device)
    job.late_tokenizer = lambda: load_tokenizer(pipeline.model.name or job.program.source.name)
    return job


def say_warnings(records: Sequence[PassRecord]) -> None:
    """What passes warned of, as warnings of Python at the caller's caller."""
    for record in records:
        for warning in record.warnings:
            warnings.warn(f"{record.name}: {warning}", stacklevel=3)
