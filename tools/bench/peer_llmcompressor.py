"""llm-compressor's GPTQ, for comparison: the same samples, the same linears, int4 in groups of 32 along the input axis.

What differs from MXINT4@32: its scales are any number of the weight's dtype, not powers of two, one for each row and
group, from the largest magnitude before rounding starts and never searched; columns are ordered by activation energy
with groups as they lie ("static"); Hessians of one decoder layer all come from one pass over the layer before any of
its linears is rounded, then the layer runs again, as in Mase.
"""

from __future__ import annotations

import tempfile
from importlib.util import find_spec

from torch import Tensor, nn
from torch.utils.data import DataLoader

_LINEARS = r"re:.*layers\.\d+\..*_proj$"


def missing() -> str | None:
    """Why llm-compressor cannot run here; None if it can."""
    absent = [name for name in ("llmcompressor", "compressed_tensors", "datasets") if find_spec(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else None


def llmcompressor_gptq(
    model: nn.Module, ids: Tensor, *, batch_size: int = 8, bits: int = 4, group: int = 32
) -> nn.Module:
    """Round all linears in the decoder layers of a Hugging Face model in place; activations stay on its device.

    ``ids`` are int64 ``(samples, length)`` on the CPU. Needs ``llmcompressor`` 0.14.
    """
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from loguru import logger

    for package in ("llmcompressor", "compressed_tensors"):
        logger.disable(package)
    weights = QuantizationArgs(num_bits=bits, type="int", symmetric=True, strategy="group", group_size=group)
    scheme = QuantizationScheme(targets=[_LINEARS], weights=weights)
    recipe = GPTQModifier(config_groups={"decoder": scheme}, ignore=["lm_head"])
    loader = DataLoader([{"input_ids": row} for row in ids], batch_size=batch_size)
    with tempfile.TemporaryDirectory() as folder:
        # It reads the configuration again from where the model says that it came from.
        model.config.save_pretrained(folder)  # type: ignore[union-attr, operator]
        model.config.name_or_path = folder  # type: ignore[union-attr]
        device = str(next(model.parameters()).device)
        return oneshot(
            model=model,
            dataset=loader,
            recipe=recipe,
            pipeline="sequential",
            sequential_offload_device=device,
            # Tokens are there already; it only checks that a tokenizer is given.
            processor=object(),
        )
