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
    val = node.meta["val"]
    return _runs(node) and (
        (block <= limits.MAX_TRANSFORM and val.shape[-1] % block == 0) or limits.takes_kronecker(val, block, None)
    )


def _serves_fast_hadamard(node: fx.Node) -> bool:
    """Orders that no kernel of ours takes."""
    return _runs(node) and limits.takes_fast_hadamard(int(_argument(node, "block")))  # type: ignore[call-overload]


def _serves_hadamard_quantize(node: fx.Node) -> bool:
    block, fmt = int(_argument(node, "block")), parse(str(_argument(node, "format")))  # type: ignore[call-overload]
    return _runs(node) and limits.takes_kronecker(node.meta["val"], block, fmt)


def _serves_rope(node: fx.Node) -> bool:
    x, cos, sin = (_value(_argument(node, name)) for name in ("x", "cos", "sin"))
    if x is None or cos is None or sin is None:
        return False
    return _runs(node) and limits.takes_rope(x, cos, sin)


def _serves_fused(node: fx.Node) -> bool:
    fmt = parse(str(_argument(node, "format")))
    return _runs(node) and limits.takes_transform(node.meta["val"], _value(_argument(node, "matrix")), fmt)


def _serves_norm(node: fx.Node) -> bool:
    x, weight, matrix = (_value(_argument(node, name)) for name in ("x", "weight", "matrix"))
    return _runs(node) and x is not None and limits.takes_norm(x, weight, matrix, parse(str(_argument(node, "format"))))


def _serves_silu_mul(node: fx.Node) -> bool:
    gate, up = _value(_argument(node, "gate")), _value(_argument(node, "up"))
    if gate is None or up is None or gate.dtype != up.dtype or gate.shape != up.shape:
        return False
    return _serves_fused(node)


def _serves_rope_quantize(node: fx.Node) -> bool:
    return _serves_fused(node) and _serves_rope(node)


#: Of several for one op the first that serves is taken.
PROVIDERS = tuple(
    provide(Provider(name, op, "cuda", target, serves))
    for name, op, target, serves in (
        ("triton-fake-quantize", "fake_quantize", library.fake_quantize, _serves_quantize),
        ("triton-block-transform", "block_transform", library.block_transform, _serves_transform),
        ("triton-hadamard", "hadamard", library.hadamard, _serves_hadamard),
        ("fast-hadamard-transform", "hadamard", library.fast_hadamard, _serves_fast_hadamard),
        ("triton-rope", "rope", library.rope, _serves_rope),
        ("triton-transform-quantize", "transform_quantize", library.transform_quantize, _serves_fused),
        ("triton-hadamard-quantize", "hadamard_quantize", library.hadamard_quantize, _serves_hadamard_quantize),
        ("triton-norm-quantize", "norm_quantize", library.norm_quantize, _serves_norm),
        ("triton-silu-mul-quantize", "silu_mul_quantize", library.silu_mul_quantize, _serves_silu_mul),
        ("triton-rope-quantize", "rope_quantize", library.rope_quantize, _serves_rope_quantize),
    )
)
