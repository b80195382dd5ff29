"""The kernels as `torch.library` ops `mxfx_kernels::…`, one for each dialect op that they provide.

`@kernel(op, device, takes=…)` above a function registers it. An op runs the first kernel of its device that takes the
operands, else the dialect op's definition. So a graph lowered for one device still runs on another, and
`torch.compile(fullgraph=True)` sees one node. Every result is contiguous, whatever the strides of the input.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module

import torch
from torch import Tensor

from mxfx.algorithms.hadamard import DENSE_ORDER, hadamard_matrix, kronecker_signs, kronecker_transform
from mxfx.ground.kept import Kept
from mxfx.ops import fused, norm, quantize, transform
from mxfx.ops.dialect import _differentiate, _save_inputs, find_op
from mxfx.ops.kernels.build import library
from mxfx.ops.kernels.limits import has_fast_hadamard, has_triton
from mxfx.ops.providers import Provider, Takes, on_demand, provide, takes_all
from mxfx.ops.rope import rope as rotate

NAMESPACE = "mxfx_kernels"

_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


@dataclass(frozen=True)
class _Kernel:
    run: Callable[..., Tensor]
    takes: Takes


_KERNELS: dict[tuple[str, str], list[_Kernel]] = {}


def kernel(
    op: str, device: str, *, takes: Takes = takes_all, name: str = "", library: str = ""
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Decorator: the function below computes dialect op ``op`` on devices of type ``device``.

    It has the op's operands. ``takes``, with the same operands, gives the reason why the kernel does not take them, or
    None; the definition takes the rest, as it does where the function itself returns ``NotImplemented``. ``name`` is
    what ``lower`` reports. ``library`` is the ``mxfx_kernels`` op that runs it, by default that of the dialect op's
    name; it is made if there is none. Raises ``ValueError`` for an op that is not defined.
    """

    def register(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        own = library or op
        record = find_op(getattr(getattr(torch.ops.mxfx, op, None), "default", None))
        if record is None or record.definition is None:
            raise ValueError(f"kernel {run.__name__}: the dialect has no op {op!r}; define it first (mxfx.ops.define)")
        target = _OPS.get(own) or kernel_op(record.definition, name=own, fake=record.shape)
        if (own, device) not in _KERNELS and device != "cuda":
            _LIBRARY.impl(own, _on_device(own, device, record.definition), device.upper())
        _KERNELS.setdefault((own, device), []).append(_Kernel(run, takes))
        provide(Provider(name or run.__name__.replace("_", "-"), op, device, target, takes))
        return run

    return register


def load_cuda() -> str | None:
    """Register the kernels for CUDA devices; why there are none, where Triton is missing."""
    if has_triton():
        import_module("mxfx.ops.kernels.cuda")
    if has_fast_hadamard():
        import_module("mxfx.ops.kernels.fast_hadamard")
    return None if has_triton() else "triton is not installed here"


@cache
def load_cpu() -> str | None:
    """Register the kernels for CPUs; why those in C are missing, where they cannot be built."""
    built = library()
    if not isinstance(built, str):
        import_module("mxfx.ops.kernels.cpu")
    # The definition as a whole works a cache-sized chunk at a time, three to five times as fast (one core, 4096², mxfp4
    # and mxint4/mse) as its ops one by one, and torch.compile traces through it.
    provide(Provider("chunked", "fake_quantize", "cpu", quantize.fake_quantize))
    return built if isinstance(built, str) else None


on_demand("cuda", load_cuda)
on_demand("cpu", load_cpu)


def _on_device(name: str, device: str, definition: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The first kernel that takes the operands, else the definition."""

    def run(*args, **kwargs):
        if device == "cuda":
            load_cuda()
        for one in _KERNELS.get((name, device), ()):
            out = one.run(*args, **kwargs) if one.takes(*args, **kwargs) is None else NotImplemented
            if out is not NotImplemented:
                return out
        return definition(*args, **kwargs).contiguous()

    return run


_OPS: dict[str, torch._ops.OpOverload] = {}


def kernel_op(
    definition: Callable[..., Tensor],
    backward: Callable | None = None,
    save: Callable | None = None,
    name: str = "",
    fake: Callable[..., Tensor] | None = None,
) -> torch._ops.OpOverload:
    """`mxfx_kernels::<name>`: the kernels of that name on their devices, elsewhere the definition.

    `backward` and `save` are autograd's formula and what it keeps; without them the op has no derivative. `fake` gives
    the result on fake tensors where it has not the shape of the first operand. Registered with the dispatcher directly:
    the checks of `torch.library.custom_op` take the host longer than most kernels run.
    """
    name = name or definition.__name__

    def anywhere(*args, **kwargs):
        return definition(*args, **kwargs).contiguous()

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

    signature.__signature__ = inspect.signature(definition, eval_str=True)
    schema = torch.library.infer_schema(signature, mutates_args=())
    _LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, anywhere, "CompositeExplicitAutograd")
    _LIBRARY.impl(name, _on_device(name, "cuda", definition), "CUDA")
    qualified = f"{NAMESPACE}::{name}"
    torch.library.register_fake(qualified, fake or on_fake, lib=_LIBRARY)
    torch.library.register_autograd(qualified, backward or no_backward, setup_context=save, lib=_LIBRARY)
    _OPS[name] = getattr(getattr(torch.ops, NAMESPACE), name).default
    return _OPS[name]


def _straight_through(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
    return grad, None, None


def _save_operands(ctx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _transform_backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    x, matrix = ctx.saved_tensors
    of_x = block_transform(grad, matrix.mT.contiguous()) if ctx.needs_input_grad[0] else None
    of_matrix = transform.matrix_gradient(x, matrix, grad) if ctx.needs_input_grad[1] else None
    return of_x, of_matrix


@Kept
def signs_of(order: int, device: torch.device) -> Tensor:
    """The Hadamard matrix of an order."""
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
fast_hadamard = kernel_op(transform.hadamard, _hadamard_backward, _save_order, "fast_hadamard")
rope = kernel_op(rotate, _rope_backward, _save_operands)
rms_norm = kernel_op(norm.rms_norm, _differentiate(norm.rms_norm, []), _save_inputs)
transform_quantize = kernel_op(fused.transform_quantize)
hadamard_quantize = kernel_op(fused.hadamard_quantize)
norm_quantize = kernel_op(fused.norm_quantize)
silu_mul_quantize = kernel_op(fused.silu_mul_quantize)
rope_quantize = kernel_op(fused.rope_quantize)
