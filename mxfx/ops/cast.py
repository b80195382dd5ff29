"""``mxfx::cast``: a cast that names its role instead of a dtype, so that one program runs in any precision."""

from __future__ import annotations

import torch
from torch import Tensor

from mxfx.ops.catalogue import plain
from mxfx.ops.dialect import compute, define


@define("cast", operands=(plain("input", "x"),))
def cast(x: Tensor, role: str) -> Tensor:
    """``role`` is ``compute`` (max(float32, model dtype)) or ``model`` (the dtype that the model runs in).

    Inside a program the op stands for the cast that ``lower`` writes with the program's dtype. Run by itself, as the
    verifier does on fake tensors, ``model`` means bfloat16, the nominal model dtype of every trace.

    Raises ``ValueError`` for another role.
    """
    if role == "compute":
        return compute(x)
    if role == "model":
        return x.to(torch.bfloat16)
    raise ValueError(f"mxfx::cast role {role!r}: expected 'compute' or 'model'")
