"""The kernels as `torch.library` ops `mxfx_kernels::…`, one for each dialect op that they provide.

On a CPU an op runs the dialect op's definition; on a CUDA device it runs the Triton kernel, or the definition
for what the kernel does not take. So a graph lowered for one device still runs on another, and
`torch.compile(fullgraph=True)` sees one node. Every result is contiguous, whatever the strides of the input.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module

import torch
from torch import Tensor

from mxfx.algorithms.hadamard import DENSE_ORDER, hadamard_matrix, kronecker_signs, kronecker_transform
from mxfx.ops import fused, quantize, transform
from mxfx.ops.kernels.fast_hadamard import by_package
from mxfx.ops.kernels.limits import has_triton
from mxfx.ops.rope import rope as rotate

NAMESPACE = "mxfx_kernels"

_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


def kernel_op(
    definition: Callable[..., Tensor],
    backward: Callable | None = None,
    save: Callable | None = None,
    name: str = "",
    cuda: Callable[..., Tensor] | None = None,
) -> torch._ops.OpOverload:
    """`mxfx_kernels::<name>`, of `cuda`, by default the function of that name in `.cuda`, and the definition.

    `backward` and `save` are autograd's formula and what it keeps; without them the op has no derivative. Registered
    with the dispatcher directly: the checks of `torch.library.custom_op` take the host longer than most kernels run.
    """
    name = name or definition.__name__

    def anywhere(*args, **kwargs):
        return definition(*args, **kwargs).contiguous()

    def on_cuda(*args, **kwargs):
        nonlocal cuda
        if cuda is None:
            cuda = getattr(import_module("mxfx.ops.kernels.cuda"), name) if has_triton() else _nothing
        out = cuda(*args, **kwargs)
        return anywhere(*args, **kwargs) if out is NotImplemented else out

    def on_fake(x, *rest, **kwargs):
        tensors = [t for t in (*rest, *kwargs.values()) if isinstance(t, Tensor)]
        # Operands of several dtypes promote in some ops and not in others.
        dtype = x.dtype if all(t.dtype == x.dtype for t in tensors) else definition(x, *rest, **kwargs).dtype
        return torch.empty(x.shape, dtype=dtype, device=x.device)

    def no_backward(ctx, grad):
        raise RuntimeError(
            f"{NAMESPACE}::{name} has no derivative; differentiate mxfx::{name}, before `lower` replaces it"
        )

    def signature(*args, **kwargs): ...

    signature.__signature__ = inspect.signature(definition, eval_str=True)  # type: ignore[attr-defined]
    schema = torch.library.infer_schema(signature, mutates_args=())
    _LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, anywhere, "CompositeExplicitAutograd")
    _LIBRARY.impl(name, on_cuda, "CUDA")
    qualified = f"{NAMESPACE}::{name}"
    torch.library.register_fake(qualified, on_fake, lib=_LIBRARY)
    torch.library.register_autograd(qualified, backward or no_backward, setup_context=save, lib=_LIBRARY)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def _nothing(*args, **kwargs) -> Tensor:
    return NotImplemented


def _straight_through(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
    return grad, None, None


def _save_operands(ctx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _transform_backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    x, matrix = ctx.saved_tensors
    of_x = block_transform(grad, matrix.mT.contiguous()) if ctx.needs_input_grad[0] else None
    of_matrix = transform.matrix_gradient(x, matrix, grad) if ctx.needs_input_grad[1] else None
    return of_x, of_matrix


@lru_cache(maxsize=64)
def signs_of(order: int, device: torch.device) -> Tensor:
    """The Hadamard matrix of an order, kept on the device: a call may be part of a CUDA graph."""
    return hadamard_matrix(order, torch.float32, device)


def _save_order(ctx, inputs: tuple, output: Tensor) -> None:
    ctx.order = inputs[1]


def _hadamard_backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
    if ctx.order <= DENSE_ORDER:
        return block_transform(grad, signs_of(ctx.order, grad.device).mT.contiguous()), None
    left, right = kronecker_signs(ctx.order, torch.promote_types(grad.dtype, torch.float32), grad.device)
    return kronecker_transform(grad, left.mT, right.mT), None


def _rope_backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
        return torch.autograd.grad(rotate(*leaves), leaves, grad)


fake_quantize = kernel_op(quantize.fake_quantize, _straight_through)
block_transform = kernel_op(transform.block_transform, _transform_backward, _save_operands)
hadamard = kernel_op(transform.hadamard, _hadamard_backward, _save_order)
fast_hadamard = kernel_op(transform.hadamard, _hadamard_backward, _save_order, "fast_hadamard", by_package)
rope = kernel_op(rotate, _rope_backward, _save_operands)
transform_quantize = kernel_op(fused.transform_quantize)
hadamard_quantize = kernel_op(fused.hadamard_quantize)
norm_quantize = kernel_op(fused.norm_quantize)
silu_mul_quantize = kernel_op(fused.silu_mul_quantize)
rope_quantize = kernel_op(fused.rope_quantize)
