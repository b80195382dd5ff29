"""Level 4: arity and kinds of operands, no device or dtype literal, no op that writes its operands but caches."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, fx

import mxfx.ops
from mxfx.graph.fake import SIZES
from mxfx.graph.node import op_name
from mxfx.graph.verify.fault import fault
from mxfx.ops import find_op

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_ROLES = ("compute", "model")


def schema(node: fx.Node, lowered: bool) -> None:
    if node.op != "call_function":
        return
    if isinstance(node.target, torch._ops.OpOverload):
        _overload(node, node.target)
    else:
        _function(node)
    for operand in _flat((*node.args, *node.kwargs.values())):
        if isinstance(operand, torch.device):
            raise fault(node, f"it names the device {operand}", "make tensors from an operand (new_zeros, ones_like)")
        if isinstance(operand, torch.dtype) and operand in _FLOATS and not lowered:
            raise fault(node, f"it names the dtype {operand}", "use mxfx.cast with the role 'compute' or 'model'")
        if isinstance(operand, Tensor):
            raise fault(node, "it holds a tensor as a literal", "put it in the weight store with Rewriter.add_weight")
    if op_name(node) == "mxfx.cast.default" and node.args[1] not in _ROLES:
        raise fault(node, f"the role {node.args[1]!r} is unknown", f"use {' or '.join(_ROLES)}")


def _overload(node: fx.Node, target: torch._ops.OpOverload) -> None:
    schema = target._schema
    if schema.is_mutable and find_op(target) is None:
        raise fault(node, "it writes its operands", "use the op without the trailing underscore")
    positional = [a for a in schema.arguments if not a.kwarg_only]
    if len(node.args) > len(positional):
        raise fault(node, f"it has {len(node.args)} operands, the op takes {len(positional)}", f"see {schema}")
    given = dict(zip((a.name for a in positional), node.args, strict=False))
    twice = sorted(set(given) & set(node.kwargs))
    if twice:
        raise fault(node, f"the operand {twice[0]!r} is given twice", f"see {schema}")
    if target.namespace == "mxfx" and node.kwargs:
        by_name = sorted(node.kwargs)[0]
        raise fault(node, f"its operand {by_name!r} is given by name", f"give operands in the order of {schema}")
    given |= node.kwargs
    unknown = sorted(set(given) - {a.name for a in schema.arguments})
    if unknown:
        raise fault(node, f"the op has no operand {unknown[0]!r}", f"see {schema}")
    for argument in schema.arguments:
        if argument.name not in given:
            if not argument.has_default_value():
                raise fault(node, f"the operand {argument.name!r} is missing", f"see {schema}")
            continue
        if not _fits(given[argument.name], argument.type):
            raise fault(
                node, f"{argument.name} is {_said(given[argument.name])}, expected {argument.type}", f"see {schema}"
            )


def _fits(operand: object, wanted: torch._C.JitType) -> bool:
    """Whether an operand can be passed for an argument of a schema's type."""
    if isinstance(wanted, torch._C.OptionalType):
        return operand is None or _fits(operand, wanted.getElementType())
    if isinstance(operand, fx.Node):
        operand = operand.meta.get("val")
    if isinstance(wanted, torch._C.ListType):
        inner = wanted.getElementType()
        return (isinstance(operand, list | tuple) and all(_fits(item, inner) for item in operand)) or _fits_one(
            operand, inner
        )
    match wanted.kind():
        case "TensorType":
            # x * 2.0 is aten.mul.Tensor with a number, which torch wraps.
            return isinstance(operand, Tensor | float) or type(operand) is int
        case "IntType" | "SymIntType":
            # A dtype, layout or memory format is an int in a schema.
            return isinstance(operand, int | torch.SymInt | torch.dtype | torch.layout | torch.memory_format)
        case "FloatType":
            return isinstance(operand, int | float | torch.SymInt | torch.SymFloat)
        case "NumberType":
            return isinstance(operand, int | float | complex | torch.SymInt | torch.SymFloat)
        case "BoolType":
            return isinstance(operand, bool | torch.SymBool)
        case "StringType":
            return isinstance(operand, str)
    return True


def _fits_one(operand: object, inner: torch._C.JitType) -> bool:
    """``dim=1`` may stand for ``dim=[1]``."""
    return isinstance(operand, int) and inner.kind() in ("IntType", "SymIntType")


def _said(operand: object) -> str:
    if isinstance(operand, fx.Node):
        return f"%{operand.name}, a {type(operand.meta.get('val')).__name__}"
    return f"{operand!r}"


def _function(node: fx.Node) -> None:
    target = node.target
    name = getattr(target, "__name__", "")
    homes = (mxfx.ops, operator, SIZES)
    known: Callable | None = next((found for home in homes if (found := getattr(home, name, None))), None)
    if known is None or known is not target:
        raise fault(node, f"it calls the Python function {target!r}", "define an op (mxfx.ops.define) and call that")
    try:
        inspect.signature(known).bind(*node.args, **node.kwargs)
    except TypeError as error:
        raise fault(node, f"its operands do not fit: {error}", f"see {name}{inspect.signature(known)}") from error


def _flat(operands: Iterable[object]) -> Iterable[object]:
    for operand in operands:
        if isinstance(operand, list | tuple):
            yield from _flat(operand)
        else:
            yield operand
