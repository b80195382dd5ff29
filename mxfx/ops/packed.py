"""``mx_linear``, ``mx_expert_linear``, ``mx_embedding``, ``mx_decode``: weights as packed codes and shared scales."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mxfx.formats.stored import require_length, restore
from mxfx.ops.catalogue import OUTPUT, Contraction, activation, plain, weight
from mxfx.ops.dialect import define
from mxfx.ops.experts import expert_linear
from mxfx.ops.quantize import _format


def _projected(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, format: str) -> Tensor:
    require_length(codes, scales, _format(format), x.shape[-1])
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def _gathered(codes: Tensor, scales: Tensor, ids: Tensor, format: str, width: int) -> Tensor:
    return codes.new_empty((*ids.shape, width), dtype=torch.float32)


def _decoded(codes: Tensor, scales: Tensor, format: str, width: int) -> Tensor:
    return codes.new_empty((*codes.shape[:-1], width), dtype=torch.float32)


def _through_experts(
    x: Tensor, codes: Tensor, scales: Tensor, experts: Tensor, bias: Tensor | None, format: str
) -> Tensor:
    require_length(codes, scales, _format(format), x.shape[-1])
    return x.new_empty((*experts.shape, codes.shape[1]))


_OPERANDS = (
    weight("weight", "codes", features=-2),
    weight("scales", axis=None),
    activation("input", "x"),
    OUTPUT,
    weight("bias"),
)
_CONTRACTS = (Contraction("input", "weight", over="input channels"),)


@define("mx_linear", operands=_OPERANDS, contracts=_CONTRACTS, fake=_projected)
def mx_linear(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, format: str) -> Tensor:
    """``linear(x, w, bias)`` with ``w`` ``(out, in)`` decoded from what ``mxfx.formats.stored.store`` gave.

    ``x`` is ``(..., in)``, ``codes`` uint8 ``(out, ceil(in · bits / 8))``, ``scales`` uint8 ``(out, ceil(in / block))``
    in blocks of ``format`` along ``in``; the result is ``(..., out)`` in ``x``'s dtype. The bits are those of a linear
    whose weight was decoded first.
    """
    return F.linear(x, restore(codes, scales, _format(format), x.shape[-1], x.dtype), bias)


@define("mx_expert_linear", operands=(*_OPERANDS, plain("experts")), contracts=_CONTRACTS, fake=_through_experts)
def mx_expert_linear(
    x: Tensor, codes: Tensor, scales: Tensor, experts: Tensor, bias: Tensor | None, format: str
) -> Tensor:
    """``mxfx::expert_linear`` with weights ``(experts, out, in)`` decoded from packed codes and scales.

    ``codes`` is uint8 ``(experts, out, ceil(in · bits / 8))``, ``scales`` uint8 ``(experts, out, ceil(in / block))``;
    the rest is as there. The bits are those of an expert linear whose weights were decoded first.
    """
    return expert_linear(x, restore(codes, scales, _format(format), x.shape[-1], x.dtype), experts, bias)


@define(
    "mx_embedding",
    operands=(weight("weight", "codes"), weight("scales", axis=None), plain("indices", "ids"), OUTPUT),
    fake=_gathered,
)
def mx_embedding(codes: Tensor, scales: Tensor, ids: Tensor, format: str, width: int) -> Tensor:
    """Rows ``ids`` of a packed ``(rows, width)`` table, float32 ``(*ids.shape, width)``; only they are decoded."""
    return restore(codes[ids], scales[ids], _format(format), width, torch.float32)


@define(
    "mx_decode",
    operands=(weight("weight", "codes"), weight("scales", axis=None), OUTPUT),
    fake=_decoded,
)
def mx_decode(codes: Tensor, scales: Tensor, format: str, width: int) -> Tensor:
    """All of a packed tensor ``(..., width)``, float32: for who reads it whole, as a transform reads its matrix."""
    return restore(codes, scales, _format(format), width, torch.float32)
