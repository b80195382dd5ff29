"""Products with packed weights as `torch.library` ops that choose their way by device, dtype and number of rows.

On a CPU each runs its definition. On a CUDA device few rows meet the packed codes themselves; for many the weight is
expanded into memory that the allocator gives to the next layer after, and a GEMM runs. Rows are a shape: the choice
costs no synchronization, is made once in a CUDA graph, and `torch.compile` sees one node.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module

import torch
from torch import Tensor

from mxfx.ops import fp8, packed
from mxfx.ops.kernels.kept import Kept
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


#: The last argument of every op that multiplies.
SUMS = ', *, str sums="exact")'


@Kept
def inexact_rows(device: torch.device) -> Tensor:
    """int64 (1,) on the device: rows that had to be rounded to E4M3 or int8 there, since the process began."""
    return torch.zeros(1, dtype=torch.int64, device=device)


def inexact_count() -> int:
    """The same, of all devices together; waits for them."""
    return sum(int(count) for count in inexact_rows)


def _define(
    name: str, schema: str, definition: Callable, fake: Callable, module: str = "packed_cuda"
) -> torch._ops.OpOverload:
    """`mxfx_kernels::<name>`: of a module on a CUDA device, else, or where that takes it not, the definition."""

    def anywhere(*args, **how):
        return definition(*args, **how)

    def on_cuda(*args, **how):
        out = _on_cuda(name, module)(*args, **how) if has_triton() else NotImplemented
        return definition(*args, **how) if out is NotImplemented else out

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


LINEAR = _define(
    "mx_linear",
    "(Tensor x, Tensor codes, Tensor scales, Tensor? bias, str format) -> Tensor",
    packed.mx_linear,
    packed._projected,
)
EXPERT_LINEAR = _define(
    "mx_expert_linear",
    "(Tensor x, Tensor codes, Tensor scales, Tensor experts, Tensor? bias, str format) -> Tensor",
    packed.mx_expert_linear,
    packed._through_experts,
)
EMBEDDING = _define(
    "mx_embedding",
    "(Tensor codes, Tensor scales, Tensor ids, str format, SymInt width) -> Tensor",
    packed.mx_embedding,
    packed._gathered,
)
E4M3_ROWS = _define("e4m3_rows", "(Tensor x) -> (Tensor, Tensor)", e4m3_rows, _fake_rows)
LINEAR_E4M3 = _define(
    "mx_linear_e4m3",
    "(Tensor payload, Tensor row_scales, Tensor[] codes, Tensor[] scales, Tensor[] biases, str format, "
    f"ScalarType dtype{SUMS} -> Tensor",
    mx_linear_e4m3,
    _fake_products,
)


def _rounding(name: str) -> torch._ops.OpOverload:
    """`mxfx_kernels::<name>_e4m3`: what a quantizer of that name gives, as `e4m3_rows` gives it."""
    quantizer = getattr(getattr(torch.ops, NAMESPACE), name).default

    def definition(*args):
        return fp8.to_rows(quantizer(*args))

    def fake(x: Tensor, *rest):
        return _fake_rows(x)

    arguments = str(quantizer._schema).partition("(")[2].rpartition(" -> ")[0]
    return _define(f"{name}_e4m3", f"({arguments} -> (Tensor, Tensor)", definition, fake)


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

    arguments = str(quantizer._schema).partition("(")[2].rpartition(" -> ")[0]
    own = "Tensor[] codes, Tensor[] scales, Tensor[] biases, Tensor? residual, str weights"
    arguments = arguments.removesuffix(")") + SUMS
    return _define(f"{name}_linear", f"({own}, {arguments} -> Tensor", definition, fake)


#: The op that gives a quantizer's result as rows of E4M3 → the op that multiplies it too.
MULTIPLYING = {rounding: _multiplying(quantizer.name().partition("::")[2]) for quantizer, rounding in ROUNDING.items()}
NORM_LINEAR = getattr(torch.ops, NAMESPACE).norm_quantize_linear.default


def _add_norm_quantize_linear(
    codes: list[Tensor],
    scales: list[Tensor],
    biases: list[Tensor],
    branch: Tensor,
    weights: str,
    x: Tensor,
    *operands,
    sums: str = "exact",
) -> tuple[Tensor, Tensor]:
    """`x + branch`, and what `norm_quantize_linear` gives of that without a residual of its own."""
    total = x + branch
    return total, NORM_LINEAR(codes, scales, biases, None, weights, total, *operands, sums=sums)


def _fake_sum_and_products(
    codes: list, scales: list, biases: list, branch: Tensor, weights: str, x: Tensor, *rest, **how
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((*x.shape[:-1], sum(c.shape[0] for c in codes)))


ADD_NORM_LINEAR = _define(
    "add_norm_quantize_linear",
    str(NORM_LINEAR._schema)
    .partition("linear")[2]
    .replace("Tensor? residual", "Tensor branch")
    .replace("-> Tensor", "-> (Tensor, Tensor)"),
    _add_norm_quantize_linear,
    _fake_sum_and_products,
)

for _device in ("cpu", "cuda"):
    provide(Provider("packed", "mx_linear", _device, LINEAR))
    provide(Provider("packed", "mx_expert_linear", _device, EXPERT_LINEAR))
    provide(Provider("packed", "mx_embedding", _device, EMBEDDING))
