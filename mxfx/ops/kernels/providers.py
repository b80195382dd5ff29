"""Which node of a graph gets which kernel."""

from __future__ import annotations

import torch
from torch import fx

from mxfx.formats import parse
from mxfx.ops.kernels import library, limits
from mxfx.ops.providers import Provider, provide


def _argument(node: fx.Node, name: str) -> object:
    """Operand of a call by its name in the op's schema, defaults filled in."""
    for position, parameter in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if parameter.name == name:
            given = node.kwargs.get(name, parameter.default_value)
            return node.args[position] if position < len(node.args) else given
    raise KeyError(f"{node.target} has no parameter {name!r}")


def _value(operand: object) -> torch.Tensor | None:
    return operand.meta["val"] if isinstance(operand, fx.Node) else None


def _runs(node: fx.Node) -> bool:
    return limits.has_triton() and node.meta["val"].dtype in limits.DTYPES


def _serves_quantize(node: fx.Node) -> bool:
    axis = _argument(node, "axis")
    along_last = axis in (-1, node.meta["val"].dim() - 1)
    return _runs(node) and along_last and limits.takes_format(parse(str(_argument(node, "format"))))


def _serves_transform(node: fx.Node) -> bool:
    return _runs(node) and limits.takes_transform(node.meta["val"], _value(_argument(node, "matrix")), None)


def _serves_hadamard(node: fx.Node) -> bool:
    block = int(_argument(node, "block"))  # type: ignore[call-overload]
    return _runs(node) and block <= limits.MAX_TRANSFORM and node.meta["val"].shape[-1] % block == 0


def _serves_rope(node: fx.Node) -> bool:
    cos = _value(_argument(node, "cos"))
    return _runs(node) and cos is not None and limits.takes_rope(node.meta["val"], cos)


def _serves_fused(node: fx.Node) -> bool:
    fmt = parse(str(_argument(node, "format")))
    return _runs(node) and limits.takes_transform(node.meta["val"], _value(_argument(node, "matrix")), fmt)


def _serves_norm(node: fx.Node) -> bool:
    weight, matrix = _value(_argument(node, "weight")), _value(_argument(node, "matrix"))
    return _runs(node) and limits.takes_norm(node.meta["val"], weight, matrix, parse(str(_argument(node, "format"))))


PROVIDERS = tuple(
    provide(Provider(f"triton-{op.replace('_', '-')}", op, "cuda", target, serves))
    for op, target, serves in (
        ("fake_quantize", library.fake_quantize, _serves_quantize),
        ("block_transform", library.block_transform, _serves_transform),
        ("hadamard", library.hadamard, _serves_hadamard),
        ("rope", library.rope, _serves_rope),
        ("transform_quantize", library.transform_quantize, _serves_fused),
        ("norm_quantize", library.norm_quantize, _serves_norm),
        ("silu_mul_quantize", library.silu_mul_quantize, _serves_fused),
        ("rope_quantize", library.rope_quantize, lambda node: _serves_fused(node) and _serves_rope(node)),
    )
)
