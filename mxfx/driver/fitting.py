"""Does an emitted model fit on its device? By the estimate that ``mxfx check`` prints; if not, it runs in pieces."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mxfx.calibration.estimate import SHARE, free_bytes
from mxfx.graph.program import Program
from mxfx.pipeline.emit import emitted
from mxfx.report.memory import memory
from mxfx.runtime.causal_lm import EmittedCausalLM, as_causal_lm

#: A model in 16 bits beside what passes make of it, in times of its size.
REWRITTEN = 3


@dataclass(frozen=True)
class Fit:
    """Bytes that a model takes beside what lies on the device already, and that are free there."""

    needed: int
    free: int

    @property
    def whole(self) -> bool:
        """Whether the model is built on the device."""
        return self.needed <= SHARE * self.free

    def __str__(self) -> str:
        return f"{self.needed / 1e9:.1f} GB are needed, {self.free / 1e9:.1f} GB are free"


def fit(program: Program, device: torch.device, batch: int = 1) -> Fit:
    """Of a program that is built on ``device`` and reads ``batch`` rows of 2048 tokens."""
    found = memory(program, batch)
    # On a CPU a model of its own is made, so that nobody writes into weights of the user's.
    there = sum(t.nbytes for t in program.weights.values() if t.is_cuda and _is_on(t, device))
    return Fit(max(0, found.stored - there) + found.scratch + found.activations, free_bytes(device))


def _is_on(tensor: torch.Tensor, device: torch.device) -> bool:
    """Whether it lies on that very device; one without a number is the current one."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return device.type == "cuda" and tensor.device.index == index


def fits_rewritten(program: Program, device: torch.device) -> Fit:
    """Of a program whose weights lie on ``device`` while passes rewrite all of them in float32."""
    size = sum(tensor.nbytes for tensor in program.weights.values())
    return Fit(REWRITTEN * size, free_bytes(device))


def fitting_lm(program: Program, device: torch.device, batch: int = 1) -> EmittedCausalLM:
    """The causal LM of a program, whole where it fits, else in pieces."""
    program = emitted(program, device)
    return as_causal_lm(program, device, whole=fit(program, device, batch).whole)
