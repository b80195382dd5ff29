"""The kernels as `torch.library` ops `mxfx_kernels::…`, one for each dialect op that they provide.

On a CPU an op runs the dialect op's definition; on a CUDA device it runs the Triton kernel, or the definition
for what the kernel does not take. So a graph lowered for one device still runs on another, and
`torch.compile(fullgraph=True)` sees one node. Every result is contiguous, whatever the strides of the input.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from mxfx.algorithms.hadamard import hadamard_matrix
from mxfx.formats import Format, parse
from mxfx.formats.element import FloatElement
from mxfx.ops import fused, quantize, transform

NAMESPACE = "mxfx_kernels"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_BLOCK = 4096
MAX_TRANSFORM = 128

Kernel = Callable[..., Tensor]

_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


@lru_cache(maxsize=1)
def has_triton() -> bool:
    """Whether kernels can be compiled here."""
    return importlib.util.find_spec("triton") is not None


def kernel_op(
    definition: Kernel, *, backward: Callable | None = None, save: Callable | None = None
) -> Callable[[Kernel], torch._ops.OpOverload]:
    """Decorator: make `mxfx_kernels::<name>` of a CUDA implementation and the definition that it stands for.

    `backward` and `save` are autograd's formula and what it keeps; without them the op has no derivative. The
    implementation returns `NotImplemented` for operands that its kernel does not take. Registered with the
    dispatcher directly: the checks of `torch.library.custom_op` take the host longer than most kernels run.
    """

    def register(cuda: Kernel) -> torch._ops.OpOverload:
        name = definition.__name__

        def anywhere(*args, **kwargs):
            return definition(*args, **kwargs).contiguous()

        def on_cuda(*args, **kwargs):
            out = cuda(*args, **kwargs) if has_triton() else NotImplemented
            return anywhere(*args, **kwargs) if out is NotImplemented else out

        def on_fake(x, *rest, **kwargs):
            return torch.empty(x.shape, dtype=x.dtype, device=x.device)

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

    return register


@lru_cache(maxsize=256)
def takes_format(fmt: Format) -> bool:
    """Whether the kernels round onto a format (an element as wide as float32 needs float64)."""
    wide = isinstance(fmt.element, FloatElement) and fmt.element.exponent_bits == 8
    return not wide and (fmt.block is None or fmt.block <= MAX_BLOCK)


def takes_transform(width: int, matrix: Tensor | None, fmt: Format | None) -> bool:
    """Whether one kernel can transform rows of `width` elements and round them onto `fmt`."""
    if matrix is not None and matrix.dim() > 3:
        return False  # a matrix for each head
    block = matrix.shape[-1] if matrix is not None else fmt.block if fmt else None
    if block is None or width % block or block > MAX_TRANSFORM:
        return False
    if fmt is None or fmt.block == block:
        return fmt is None or takes_format(fmt)
    divides = fmt.block is not None and block % fmt.block == 0
    return takes_format(fmt) and divides and block & (block - 1) == 0


@lru_cache(maxsize=256)
def _format(text: str) -> Format:
    return parse(text)


def _straight_through(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
    return grad, None, None


@kernel_op(quantize.fake_quantize, backward=_straight_through)
def fake_quantize(x: Tensor, format: str, axis: int = -1) -> Tensor:
    from mxfx.ops.kernels.quantize_triton import fake_quantize_triton

    fmt = _format(format)
    if x.dtype not in DTYPES or not takes_format(fmt) or x.dim() == 0:
        return NotImplemented
    if axis in (-1, x.dim() - 1) or fmt.block is None:
        return fake_quantize_triton(x, fmt)
    return fake_quantize_triton(x.movedim(axis, -1), fmt).movedim(-1, axis).contiguous()


def _save_operands(ctx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _transform_backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    x, matrix = ctx.saved_tensors
    of_x = block_transform(grad, matrix.mT.contiguous()) if ctx.needs_input_grad[0] else None
    of_matrix = transform.matrix_gradient(x, matrix, grad) if ctx.needs_input_grad[1] else None
    return of_x, of_matrix


@kernel_op(transform.block_transform, backward=_transform_backward, save=_save_operands)
def block_transform(x: Tensor, matrix: Tensor) -> Tensor:
    from mxfx.ops.kernels.transform_triton import transform_triton

    if x.dtype not in DTYPES or not takes_transform(x.shape[-1], matrix, None):
        return NotImplemented
    return transform_triton(x, matrix)


@lru_cache(maxsize=64)
def _hadamard(block: int, device: torch.device) -> Tensor:
    return hadamard_matrix(block, torch.float32, device)


def _save_order(ctx, inputs: tuple, output: Tensor) -> None:
    ctx.order = inputs[1]


def _hadamard_backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
    return block_transform(grad, _hadamard(ctx.order, grad.device).mT.contiguous()), None


@kernel_op(transform.hadamard, backward=_hadamard_backward, save=_save_order)
def hadamard(x: Tensor, block: int) -> Tensor:
    from mxfx.ops.kernels.transform_triton import transform_triton

    matrix = _hadamard(block, x.device)
    if x.dtype not in DTYPES or not takes_transform(x.shape[-1], matrix, None):
        return NotImplemented
    return transform_triton(x, matrix, signs=True)


@kernel_op(fused.transform_quantize)
def transform_quantize(x: Tensor, matrix: Tensor | None, format: str, hadamard: bool = False) -> Tensor:
    from mxfx.ops.kernels.transform_triton import transform_triton

    fmt = _format(format)
    if x.dtype not in DTYPES or not takes_transform(x.shape[-1], matrix, fmt):
        return NotImplemented
    return transform_triton(x, matrix, hadamard, fmt)


@kernel_op(fused.norm_quantize)
def norm_quantize(
    x: Tensor,
    weight: Tensor | None,
    matrix: Tensor | None,
    format: str,
    eps: float,
    offset: float = 0.0,
    gain_first: bool = False,
    hadamard: bool = False,
) -> Tensor:
    from mxfx.ops.kernels.norm_triton import fits, norm_triton
    from mxfx.ops.kernels.transform_triton import transform_triton

    fmt = _format(format)
    same = weight is None or weight.dtype == x.dtype
    if x.dtype not in DTYPES or not same or not takes_transform(x.shape[-1], matrix, fmt):
        return NotImplemented
    shared = matrix is None or matrix.dim() == 2
    block = matrix.shape[-1] if matrix is not None and shared else fmt.block or 32
    if not fits(x.shape[-1], block):
        return NotImplemented
    if shared:
        return norm_triton(x, weight, eps, offset, gain_first, matrix, hadamard, fmt)
    # Every block has a matrix of its own: too many for one program to hold, so the norm is a pass by itself.
    normal = norm_triton(x, weight, eps, offset, gain_first, None, False, None)
    return transform_triton(normal, matrix, hadamard, fmt)


@kernel_op(fused.silu_mul_quantize)
def silu_mul_quantize(gate: Tensor, up: Tensor, matrix: Tensor | None, format: str, hadamard: bool = False) -> Tensor:
    from mxfx.ops.kernels.transform_triton import transform_triton

    fmt = _format(format)
    same = gate.dtype == up.dtype and gate.shape == up.shape
    if up.dtype not in DTYPES or not same or not takes_transform(up.shape[-1], matrix, fmt):
        return NotImplemented
    return transform_triton(up, matrix, hadamard, fmt, gate=gate)


@kernel_op(fused.rope_quantize)
def rope_quantize(
    x: Tensor, cos: Tensor, sin: Tensor, matrix: Tensor | None, format: str, hadamard: bool = False
) -> Tensor:
    from mxfx.ops.kernels.rope_triton import rope_triton

    fmt = _format(format)
    shared = matrix is None or matrix.dim() == 2
    fits = x.dim() == 4 and cos.dim() == 3 and cos.shape[-1] == x.shape[-1] and cos.dtype == x.dtype
    if x.dtype not in DTYPES or not shared or not fits or not takes_transform(x.shape[-1], matrix, fmt):
        return NotImplemented
    return rope_triton(x, cos, sin, matrix, hadamard, fmt)
