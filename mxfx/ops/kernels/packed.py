"""Products with packed weights as `torch.library` ops that choose their way by device, dtype and number of rows.

On a CPU each runs its definition. On a CUDA device few rows meet the packed codes themselves; for many the weight is
expanded into memory that the allocator gives to the next layer after, and a GEMM runs. Rows are a shape: the choice
costs no synchronization, is made once in a CUDA graph, and `torch.compile` sees one node.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from importlib import import_module

import torch
from torch import Tensor

from mxfx.ground.kept import Kept
from mxfx.ops import fp8, packed
from mxfx.ops.dialect import find_op
from mxfx.ops.kernels.library import _LIBRARY, NAMESPACE
from mxfx.ops.kernels.limits import has_triton
from mxfx.ops.providers import Provider, provide


def e4m3_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """`mxfx.ops.fp8.to_rows`: E4M3 bytes (..., k) and a power of two a row (..., 1)."""
    return fp8.to_rows(x)


def mx_linear_e4m3(
    payload: Tensor,
    row_scales: Tensor,
    codes: list[Tensor],
    scales: list[Tensor],
    biases: list[Tensor],
    format: str,
    dtype: torch.dtype,
    *,
    sums: str = "exact",
) -> Tensor:
    """Linears that read one input, given as `e4m3_rows` gives it, their results side by side, `(..., Σ out)`.

    `codes`, `scales` and `biases` (as many, or none) are those of `mxfx::mx_linear`, all in one `format`. `sums`: how
    FP8 tensor cores add, as `multiply-in-fp8` says it.
    """
    x = fp8.from_rows(payload, row_scales, dtype)
    given: list[Tensor | None] = [*biases] or [None] * len(codes)
    parts = [packed.mx_linear(x, c, s, b, format) for c, s, b in zip(codes, scales, given, strict=True)]
    return torch.cat(parts, -1)


@Kept
def inexact_rows(device: torch.device) -> Tensor:
    """int64 (1,) on the device: rows that had to be rounded to E4M3 or int8 there, since the process began.

    Of rows whose blocks several programs bring to int8, each counts what it sees: one may count more than once.
    """
    return torch.zeros(1, dtype=torch.int64, device=device)


def inexact_count() -> int:
    """The same, of all devices together; waits for them."""
    return sum(int(count) for count in inexact_rows)


def _define(
    name: str,
    definition: Callable,
    fake: Callable,
    module: str = "packed_cuda",
    signature: inspect.Signature | None = None,
) -> torch._ops.OpOverload:
    """`mxfx_kernels::<name>`: of a module on a CUDA device, else, or where that takes it not, the definition.

    Its schema is that of the definition, or of `signature` for one that has no operands of its own.
    """

    def typed(*args, **how): ...

    typed.__signature__ = signature or inspect.signature(definition, eval_str=True)

    def anywhere(*args, **how):
        return definition(*args, **how)

    def on_cuda(*args, **how):
        out = _on_cuda(name, module)(*args, **how) if has_triton() else NotImplemented
        return definition(*args, **how) if out is NotImplemented else out

    schema = torch.library.infer_schema(typed, mutates_args=())
    _LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, anywhere, "CompositeExplicitAutograd")
    _LIBRARY.impl(name, on_cuda, "CUDA")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)

    def no_backward(ctx, *grads):
        raise RuntimeError(f"{NAMESPACE}::{name} has no derivative; differentiate the graph before `lower`")

    torch.library.register_autograd(f"{NAMESPACE}::{name}", no_backward, lib=_LIBRARY)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


@cache
def _on_cuda(name: str, module: str) -> Callable:
    return getattr(import_module(f"mxfx.ops.kernels.{module}"), name)


def _fake_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.uint8), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def _fake_products(
    payload: Tensor,
    row_scales: Tensor,
    codes: list,
    scales: list,
    biases: list,
    format: str,
    dtype: torch.dtype,
    sums: str = "exact",
) -> Tensor:
    return payload.new_empty((*payload.shape[:-1], sum(c.shape[0] for c in codes)), dtype=dtype)


LINEAR = _define("mx_linear", packed.mx_linear, packed._projected)
EXPERT_LINEAR = _define("mx_expert_linear", packed.mx_expert_linear, packed._through_experts)
EMBEDDING = _define("mx_embedding", packed.mx_embedding, packed._gathered)
E4M3_ROWS = _define("e4m3_rows", e4m3_rows, _fake_rows)
LINEAR_E4M3 = _define("mx_linear_e4m3", mx_linear_e4m3, _fake_products)


def _signature(name: str) -> inspect.Signature:
    """Of the dialect op of that name, as its record has it."""
    record = find_op(getattr(torch.ops.mxfx, name).default)
    assert record is not None and record.definition is not None
    return inspect.signature(record.definition, eval_str=True)


def _rounding(name: str) -> torch._ops.OpOverload:
    """`mxfx_kernels::<name>_e4m3`: what a quantizer of that name gives, as `e4m3_rows` gives it."""
    quantizer = getattr(getattr(torch.ops, NAMESPACE), name).default

    def definition(*args):
        return fp8.to_rows(quantizer(*args))

    def fake(x: Tensor, *rest):
        return _fake_rows(x)

    signature = _signature(name).replace(return_annotation=tuple[Tensor, Tensor])
    return _define(f"{name}_e4m3", definition, fake, signature=signature)


#: Quantizer → the op that gives its result as rows of E4M3.
ROUNDING = {
    getattr(getattr(torch.ops, NAMESPACE), name).default: _rounding(name)
    for name in ("fake_quantize", "transform_quantize", "hadamard_quantize", "norm_quantize", "silu_mul_quantize")
}


def _multiplying(name: str) -> torch._ops.OpOverload:
    """`mxfx_kernels::<name>_linear`: linears of what a quantizer of that name gives, side by side, and a residual."""
    quantizer = getattr(getattr(torch.ops, NAMESPACE), name).default

    def definition(
        codes: list[Tensor],
        scales: list[Tensor],
        biases: list[Tensor],
        residual: Tensor | None,
        weights: str,
        *operands,
        sums: str = "exact",
    ) -> Tensor:
        x = quantizer(*operands)
        given: list[Tensor | None] = [*biases] or [None] * len(codes)
        parts = [packed.mx_linear(x, c, s, b, weights) for c, s, b in zip(codes, scales, given, strict=True)]
        y = torch.cat(parts, -1)
        return y if residual is None else residual + y

    def fake(
        codes: list, scales: list, biases: list, residual: Tensor | None, weights: str, x: Tensor, *rest, **how
    ) -> Tensor:
        return x.new_empty((*x.shape[:-1], sum(c.shape[0] for c in codes)))

    return _define(f"{name}_linear", definition, fake, signature=_between(definition, name))


def _between(multiplies: Callable, quantizer: str) -> inspect.Signature:
    """That of a function of weights, `*operands` and how to multiply, with a quantizer's own for those."""
    signature, operands = inspect.signature(multiplies, eval_str=True), _signature(quantizer).parameters.values()
    own = signature.parameters.values()
    before, after = (
        [p for p in own if p.kind is kind]
        for kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    )
    return signature.replace(parameters=[*before, *operands, *after])


#: The op that gives a quantizer's result as rows of E4M3 → the op that multiplies it too.
MULTIPLYING = {rounding: _multiplying(quantizer.name().partition("::")[2]) for quantizer, rounding in ROUNDING.items()}
NORM_LINEAR = getattr(torch.ops, NAMESPACE).norm_quantize_linear.default


def _add_norm_quantize_linear(
    codes: list[Tensor],
    scales: list[Tensor],
    biases: list[Tensor],
    branch: Tensor,
    weights: str,
    *operands,
    sums: str = "exact",
) -> tuple[Tensor, Tensor]:
    """`x + branch`, `x` the first operand, and what `norm_quantize_linear` gives of that without a residual."""
    x, *rest = operands
    total = x + branch
    return total, NORM_LINEAR(codes, scales, biases, None, weights, total, *rest, sums=sums)


def _fake_sum_and_products(
    codes: list, scales: list, biases: list, branch: Tensor, weights: str, x: Tensor, *rest, **how
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((*x.shape[:-1], sum(c.shape[0] for c in codes)))


ADD_NORM_LINEAR = _define(
    "add_norm_quantize_linear",
    _add_norm_quantize_linear,
    _fake_sum_and_products,
    signature=_between(_add_norm_quantize_linear, "norm_quantize"),
)

for _device in ("cpu", "cuda"):
    provide(Provider("packed", "mx_linear", _device, LINEAR))
    provide(Provider("packed", "mx_expert_linear", _device, EXPERT_LINEAR))
    provide(Provider("packed", "mx_embedding", _device, EMBEDDING))
