"""How an op of the dialect comes to be: one definition in ATen, from which everything else follows.

``define`` turns a plain function over tensors (the *definition*) into a ``torch.library`` op ``mxfx::<name>``:
the eager kernel runs the definition, the fake kernel runs it on fake tensors, autograd differentiates it (or uses
the rule given), and ``lower`` inlines it where no provider has a faster kernel.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from mxfx.ops.catalogue import Contraction, Operand, Record, Rounding, add, record_of, records

NAMESPACE = "mxfx"

Definition = Callable[..., Tensor]


def define(
    name: str,
    *,
    operands: tuple[Operand, ...] = (),
    contracts: tuple[Contraction, ...] = (),
    rounds: Rounding | None = None,
    backward: Callable[..., tuple] | None = None,
    fake: Definition | None = None,
    shape: Definition | None = None,
    mutates: tuple[str, ...] = (),
) -> Callable[[Definition], Definition]:
    """Decorator: register ``mxfx::name`` with the decorated function as its definition, and put it in the catalogue.

    ``operands``, ``contracts`` and ``rounds`` are what passes ask for (``mxfx.ops.catalogue``).
    ``backward(ctx, grad)`` replaces the derivative of the definition, for ops whose true derivative is useless
    (rounding is flat almost everywhere). ``fake`` replaces the definition on fake tensors, where the definition would
    guard on symbolic sizes; its strides must be those of the definition. ``shape`` need not keep strides: the verifier
    asks it for sizes and dtype, else ``fake``. ``mutates`` names the operands that the op writes; it then has no
    derivative.
    """

    def register(definition: Definition) -> Definition:
        op = torch.library.custom_op(f"{NAMESPACE}::{name}", mutates_args=mutates)(_fresh(definition))
        op.register_fake(_fresh(definition) if fake is None else fake)
        parameters = list(inspect.signature(definition).parameters)
        if mutates:
            pass
        elif backward is None:
            op.register_autograd(_differentiate(definition, parameters), setup_context=_save_inputs)
        else:
            op.register_autograd(backward, setup_context=lambda ctx, inputs, output: None)
        overload = getattr(getattr(torch.ops, NAMESPACE), name).default
        add(Record(name, overload, name, operands, contracts, rounds, definition, shape or fake, backward))
        return definition

    return register


def find_op(target: object) -> Record | None:
    """The record of the dialect op behind a node's target, None for any other target."""
    record = record_of(target)
    return record if record is not None and record.definition is not None else None


def all_ops() -> dict[str, Record]:
    """The ops of the dialect, by the text of their targets."""
    return {str(record.target): record for record in records() if record.definition is not None}


def compute(x: Tensor) -> Tensor:
    """``x`` in the precision that dialect ops compute in: max(float32, its own)."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _fresh(definition: Definition) -> Definition:
    """The definition with a result that shares no memory with its inputs, as ``torch.library`` demands."""

    def kernel(*args: object, **kwargs: object) -> Tensor:
        out = definition(*args, **kwargs)
        inputs = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        shared = any(out is a or (out._is_view() and out._base is a) for a in inputs)
        return out.clone() if shared else out

    kernel.__signature__ = inspect.signature(definition, eval_str=True)
    kernel.__name__ = definition.__name__
    kernel.__annotations__ = inspect.get_annotations(definition, eval_str=True)
    return kernel


def _save_inputs(ctx, inputs: tuple, output: Tensor) -> None:
    ctx.inputs = inputs


def _differentiate(definition: Definition, parameters: list[str]) -> Callable[..., tuple]:
    def backward(ctx, grad: Tensor) -> tuple:
        differentiable = [
            i
            for i, a in enumerate(ctx.inputs)
            if isinstance(a, Tensor) and a.is_floating_point() and ctx.needs_input_grad[i]
        ]

        def forward(*tensors: Tensor) -> Tensor:
            args = list(ctx.inputs)
            for i, tensor in zip(differentiable, tensors, strict=True):
                args[i] = tensor
            return definition(*args)

        with torch.enable_grad():
            leaves = [ctx.inputs[i].detach().requires_grad_() for i in differentiable]
            grads = torch.autograd.grad(forward(*leaves), leaves, grad)
        result: list[Tensor | None] = [None] * len(ctx.inputs)
        for i, g in zip(differentiable, grads, strict=True):
            result[i] = g
        return tuple(result)

    return backward
