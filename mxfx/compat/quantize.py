"""The tutorial's entry point: a model and ``pass_args`` in, a quantized causal LM out."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mxfx.compat.tutorial import from_pass_args, unwrapped
from mxfx.config.pipeline import CalibrationConfig
from mxfx.driver.job import Job, default_instruments
from mxfx.driver.pretrained import load_tokenizer
from mxfx.pipeline.manager import Instrument
from mxfx.runtime.causal_lm import EmittedCausalLM, as_causal_lm


def quantize_module_transform_pass(
    model: nn.Module, pass_args: Mapping[str, Any], *, instruments: Sequence[Instrument] | None = None
) -> tuple[EmittedCausalLM, dict[str, Any]]:
    """Compile ``model`` as ``pass_args`` says; returns ``(model, {})`` like the tutorial's function of that name.

    The returned model has ``.config``, ``.device``, ``generate`` and goes into ``HFLM(pretrained=…)`` as it is. Unlike
    in the tutorial the model given is not changed. Calibration data come from the hub, or from the local file that
    ``[gptq] dataset`` names. Every pass is held to its promise and the graph is verified; ``instruments=()`` leaves
    that out. Passes run on the ``device`` of ``[gptq]`` or ``[rotation_search]``, else on the first CUDA device there
    is; the result comes back to where the model given lies.

    What a pass warns of is warned of in Python. Raises ``ConfigError`` for arguments that cannot be honoured, before
    any weight is touched.
    """
    pipeline = from_pass_args(pass_args)
    home = next(model.parameters()).device
    device = _device(pass_args) or (torch.device("cuda", 0) if torch.cuda.is_available() else home)
    if device.type == home.type:
        # Elsewhere the graph is emitted once it is back: kernels are those of the device that it stays on.
        pipeline = pipeline.emitted(home.type)
    job = Job.of_model(model, device)
    job.given = lambda: _tokens(job, pipeline.model.name or job.program.source.name, pipeline.calibration)
    done = job.run(pipeline, default_instruments(pipeline) if instruments is None else instruments)
    for record in done.records:
        for warning in record.warnings:
            warnings.warn(f"{record.name}: {warning}", stacklevel=2)
    return as_causal_lm(done.program, home), {}


def _device(pass_args: Mapping[str, Any]) -> torch.device | None:
    """The device that a block names: ``cuda:0``, a number, a ``torch.device``."""
    for block in ("gptq", "rotation_search"):
        named = unwrapped(pass_args.get(block, {})).get("device")
        if named is not None:
            return torch.device(named)
    return None


def _tokens(job: Job, name: str, calibration: CalibrationConfig) -> Tensor:
    job.tokenizer = job.tokenizer or load_tokenizer(name)
    return job.tokens(calibration)
