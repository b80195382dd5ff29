"""The tutorial's entry point: a model and ``pass_args`` in, a quantized causal LM out."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from mxfx.calibration.datasets import load_tokens
from mxfx.compat.tutorial import from_pass_args
from mxfx.driver.pretrained import load_tokenizer
from mxfx.graph.trace import trace
from mxfx.ground.progress import track
from mxfx.pipeline.manager import PassManager
from mxfx.rewrite import Context
from mxfx.runtime.causal_lm import EmittedCausalLM, as_causal_lm


def quantize_module_transform_pass(
    model: nn.Module, pass_args: Mapping[str, Any]
) -> tuple[EmittedCausalLM, dict[str, Any]]:
    """Compile ``model`` as ``pass_args`` says; returns ``(model, {})`` like the tutorial's function of that name.

    The returned model has ``.config``, ``.device``, ``generate`` and goes into ``HFLM(pretrained=…)`` as it is. Unlike
    in the tutorial the model given is not changed. Calibration data come from the hub, or from the local file that
    ``[gptq] dataset`` names.

    What a pass warns of is warned of in Python. Raises ``ConfigError`` for arguments that cannot be honoured, before
    any weight is touched.
    """
    pipeline = from_pass_args(pass_args)
    passes = pipeline.passes
    device = next(model.parameters()).device
    program = trace(model)

    def tokens() -> Tensor:
        tokenizer = load_tokenizer(pipeline.model.name or program.source.name)
        calibration = pipeline.calibration
        return load_tokens(
            calibration.sources[0],
            tokenizer,
            samples=calibration.samples,
            length=calibration.length,
            seed=calibration.seed,
        ).ids

    ctx = Context(seed=pipeline.calibration.seed, device=device, tokens=tokens, progress=track)
    done = PassManager().run(program, passes, ctx, locate=None)
    for record in done.records:
        for warning in record.warnings:
            warnings.warn(f"{record.name}: {warning}", stacklevel=2)
    return as_causal_lm(done.program, device), {}
