"""How many bits the weights of a program take."""

from __future__ import annotations

from mxfx.graph.node import info
from mxfx.graph.program import Program
from mxfx.rewrite.operands import is_rounded, readers_of, weight_format


def bits_per_weight(program: Program, *, planned: bool = False) -> float:
    """Mean bits of a weight: everything counts, embeddings and their untied copies, norms, transforms, shared scales.

    A tensor counts in its format once it lies on that grid (``planned``: once it is annotated), else in the program's
    dtype; constants such as rotary frequencies count in float32.
    """
    bits = 0.0
    count = 0
    for name, tensor in program.weights.items():
        count += tensor.numel()
        bits += tensor.numel() * _bits(program, name, planned)
    return bits / max(count, 1)


def _bits(program: Program, name: str, planned: bool) -> float:
    for reader in readers_of(program, name):
        fmt = weight_format(reader, name, program)
        stored = fmt is not None and any(
            planned or is_rounded(reader, operand) for operand in ("weight", "bias") if operand in info(reader).formats
        )
        if fmt is not None and stored:
            return fmt.bits_per_element
    if name in program.weights.constants:
        return 32
    return 8.0 * program.dtype.itemsize
