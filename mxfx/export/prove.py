"""Proofs that targets share: tensors read back are bit-equal, logits agree with the simulation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mxfx.export.errors import ExportError
from mxfx.export.plain import Plain
from mxfx.ground.errors import reason_of

#: Largest relative difference of float32 logits, read back against the simulation.
TOLERANCE = 1e-5


def opened(folder: Path, **options: Any) -> nn.Module:
    """What transformers makes of a folder, in float32. Raises ``ExportError`` where it opens none."""
    from transformers import AutoModelForCausalLM

    try:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    except OSError:
        raise
    except Exception as error:
        # Its readers raise what they meet: a size that the file cannot say, a token that the vocabulary lacks.
        raise ExportError(f"transformers does not open what was written: {reason_of(error)}") from error
    return model.eval()


def same_values(given: Plain, read: Mapping[str, Tensor]) -> dict[str, object]:
    """Every parameter of ``read`` equals the state bit for bit. Raises ``ExportError`` at the first that does not."""
    for name, tensor in read.items():
        expected = given.state[name].to(tensor.dtype)
        if not torch.equal(tensor.cpu(), expected):
            wrong = int((tensor.cpu() != expected).sum())
            raise ExportError(f"{name} reads back with {wrong} of {expected.numel()} elements changed")
    quantized = sum(name in given.formats or name in given.turned for name in read)
    return {"tensors bit-equal": len(read), "of them quantized": quantized}


def same_logits(given: Plain, run: Callable[[Tensor], Tensor] | nn.Module) -> dict[str, object]:
    """``run(ids)`` agrees with the simulation to ``TOLERANCE`` in float32. Raises ``ExportError`` otherwise."""
    ids = given.probe()
    with torch.no_grad():
        out = run(ids)
    logits = getattr(out, "logits", out).float()
    expected = given.simulated(ids)
    error = float((logits - expected).norm() / expected.norm())
    if not error <= TOLERANCE:
        raise ExportError(
            f"its logits differ from the simulation's by {error:.1e} of their norm (at most {TOLERANCE:.0e}): "
            "the program does more than its weights say"
        )
    return {"relative error of float32 logits": error}
