"""Level 6: annotations on operands that exist, blocks along the contraction axis, quantizers that agree."""

from __future__ import annotations

from torch import Tensor, fx

from mxfx.formats import Format, FormatError
from mxfx.formats import parse as parse_format
from mxfx.graph.node import info
from mxfx.graph.verify.fault import described, fault
from mxfx.ops.catalogue import Contraction, Spec, spec


def formats(node: fx.Node, lowered: bool) -> None:
    call = spec(node)
    if call.rounds is not None:
        _quantizer(node, call)
    for contraction in call.contracts:
        _contraction(node, call, contraction)
    for operand, annotation in info(node).formats.items():
        if not isinstance(annotation.format, Format):
            raise fault(
                node, f"{operand} carries {annotation.format!r}, which is no format", "annotate with a parsed Format"
            )
        if not lowered:
            _annotated(node, operand, annotation.format)


def _quantizer(node: fx.Node, call: Spec) -> None:
    rounded = call.rounds
    assert rounded is not None
    axis = rounded.axis
    try:
        fmt = parse_format(rounded.format)
    except FormatError as error:
        raise fault(node, str(error), "give a format such as mxint4@32") from error
    val = node.meta["val"]
    if not isinstance(axis, int) or not -val.dim() <= axis < val.dim():
        raise fault(
            node, f"axis {axis} does not exist in {described(val)}", f"use one from {-val.dim()} to {val.dim() - 1}"
        )
    if not val.is_floating_point():
        raise fault(node, f"it rounds {described(val)}", "quantize floating values only")
    # The last axis is what a reader sums over; of probabilities it is the keys, where the future is zero.
    inner = axis in (-1, val.dim() - 1) and val.dim() == 4
    if fmt.block is not None and not isinstance(val.shape[axis], int) and not inner:
        raise fault(
            node,
            f"blocks of {fmt.block} run along axis {axis} of {described(val)}, whose length is not fixed",
            "let blocks run along a fixed axis: a token's codes may not depend on its neighbours",
        )


def _contraction(node: fx.Node, call: Spec, contraction: Contraction) -> None:
    """Blocks along any other axis than the one summed over cannot be multiplied in the format."""
    for name, axis in zip((contraction.left, contraction.right), contraction.axes, strict=True):
        source = call.node_of(name)
        rounded = spec(source).rounds if source is not None else None
        if rounded is None or rounded.axis in (axis, call.axis(name)):
            continue
        raise fault(
            node,
            f"its {name} has blocks along axis {rounded.axis}; it sums over axis {axis} ({contraction.over})",
            f"quantize along axis {axis}",
        )


def _annotated(node: fx.Node, operand: str, fmt: Format) -> None:
    call = spec(node)
    if operand == "output":
        # Any value may carry the format that it is to be rounded to: a rotated input, scores of spelled-out attention.
        val = node.meta["val"]
        if not (isinstance(val, Tensor) and val.is_floating_point()):
            raise fault(node, f"output carries {fmt} and is {described(val)}", "annotate floating values only")
        return
    if not call.carries:
        raise fault(
            node,
            f"{operand} carries {fmt}, but no operand of this op can carry a format",
            "annotate linears, attention, …",
        )
    if not call.has(operand) or call.axis(operand) is None:
        raise fault(node, f"a {call.concept} has no operand {operand!r}", f"annotate {', '.join(call.carries)}")
    if call.operand(operand).argument is None:
        return
    source, axis = call.node_of(operand), call.axis(operand)
    if source is None:
        raise fault(node, f"{operand} carries {fmt}, but the node has no such operand", "annotate operands that exist")
    if fmt.block is not None and not isinstance(source.meta["val"].shape[axis], int):
        raise fault(node, f"{operand} has no fixed axis {axis} for blocks of {fmt.block}", "annotate another operand")
    rounded = spec(source).rounds
    if rounded is not None and rounded.format != str(fmt):
        raise fault(
            node, f"{operand} is annotated {fmt} and quantized to {rounded.format}", "let one pass decide the format"
        )
