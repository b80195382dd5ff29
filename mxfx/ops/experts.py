"""``mxfx::expert_linear``: the linear of a mixture of experts.

A layer of experts is not one op here but two linears with ordinary ops around them::

    %u = mxfx.expert_linear(%x, @gate_up_proj, %chosen)     # (tokens, in)          -> (tokens, chosen, 2 * inner)
    %h = silu(%u[..., :inner]) * %u[..., inner:]            # whatever the family does, traced
    %y = mxfx.expert_linear(%h, @down_proj, %chosen)        # (tokens, chosen, in)  -> (tokens, chosen, out)
    %o = sum(%y * %routing_weights[..., None], dim=-2)

So everything that is said of a linear holds of a stack of them: its input, weight, bias and output carry formats, its
input is a tensor like any other (a norm's gain folds into it, a transform stands before it, it is quantized once a
token however many experts read it), and the inner activation is the input of the second. No activation, clamp or gate
has a name in the dialect, and none is lost. Sorting tokens by expert is how the op is computed, not what it means.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mxfx.ops.catalogue import OUTPUT, Contraction, activation, describe, plain, weight
from mxfx.ops.dialect import define
from mxfx.ops.grouped import grouped_product


def _shape(x: Tensor, weight: Tensor, experts: Tensor, bias: Tensor | None = None) -> Tensor:
    """The result without numbers. Raises ``ValueError`` for operands that do not fit each other."""
    if weight.dim() != 3 or x.shape[-1] != weight.shape[2]:
        raise ValueError(
            f"expert_linear takes a weight (experts, out, in) and an input (…, in), got {tuple(weight.shape)} and "
            f"{tuple(x.shape)}"
        )
    if experts.dim() != 2 or x.dim() not in (2, 3):
        raise ValueError(
            f"expert_linear takes experts (tokens, chosen) and an input of 2 or 3 axes, got {tuple(experts.shape)} and "
            f"{tuple(x.shape)}"
        )
    if x.dtype != weight.dtype or (bias is not None and bias.shape != weight.shape[:2]):
        shape = None if bias is None else tuple(bias.shape)
        raise ValueError(
            f"expert_linear: input {x.dtype}, weight {weight.dtype} {tuple(weight.shape)} and bias {shape} do not fit"
        )
    return x.new_empty((*experts.shape, weight.shape[1]))


_OPERANDS = (
    weight("weight", features=-2),
    activation("input", "x"),
    OUTPUT,
    weight("bias"),
    plain("experts"),
)
_CONTRACTS = (Contraction("input", "weight", over="input channels"),)


@define("expert_linear", operands=_OPERANDS, contracts=_CONTRACTS, fake=_shape)
def expert_linear(x: Tensor, weight: Tensor, experts: Tensor, bias: Tensor | None = None) -> Tensor:
    """``y[t, j] = x[t] @ weight[e].mT + bias[e]`` for ``e = experts[t, j]``: each token through its chosen experts.

    ``x`` is ``(tokens, in)``, read by every expert that a token chose, or ``(tokens, chosen, in)``, one row for each;
    ``weight`` ``(experts, out, in)``; ``experts`` int64 ``(tokens, chosen)``, each below the number of experts;
    ``bias`` ``(experts, out)``. Returns ``(tokens, chosen, out)``. Exact: no token is dropped, whatever an expert's
    load.
    """
    flat = experts.reshape(-1)
    ordered, order = torch.sort(flat, stable=True)
    numbers = torch.cumsum(flat.new_ones(weight.shape[0]), 0) - 1
    ends = torch.searchsorted(ordered, numbers, right=True).to(torch.int32)
    rows = x[order // experts.shape[-1]] if x.dim() == 2 else x.flatten(0, 1)[order]
    y = grouped_product(rows, weight, ends)
    if bias is not None:
        y = y + bias[ordered]
    return y[torch.argsort(order)].unflatten(0, experts.shape)


# In a lowered graph the definition stands as one call: how many tokens an expert gets is data, and what is measured
# between calls keeps its place.
describe(expert_linear, "expert_linear", operands=_OPERANDS, contracts=_CONTRACTS, shape=_shape)
